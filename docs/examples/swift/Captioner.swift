// A photo's caption on iOS from the fused.onnx of a bundle (edgecap export --fused), with ONNX Runtime alone.
//
//   Swift package: https://github.com/microsoft/onnxruntime-swift-package-manager, product "onnxruntime"
//   (with CocoaPods: pod "onnxruntime-objc", and import onnxruntime_objc)
//
//   let captioner = try Captioner(path: Bundle.main.path(forResource: "fused", ofType: "onnx")!)   // once
//   let caption = try captioner.caption(rgb: rgb, width: width, height: height)                    // off the main thread

import Foundation
import OnnxRuntimeBindings

public struct Caption {
    public let text: String?  // nil where the graph leaves it to tokenizer.json (see docs/export.md)
    public let ids: [Int64]
    public let logprob: Float  // natural logarithm, at most 0
}

/// One model, loaded once; any number of threads may ask it at the same time.
public final class Captioner {
    private let environment: ORTEnv
    private let session: ORTSession
    private let outputs: Set<String>

    public init(path: String, threads: Int32 = 2) throws {
        setenv("ORT_DISABLE_TELEMETRY", "1", 0)  // official builds send some otherwise
        environment = try ORTEnv(loggingLevel: .error)
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(threads)
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: options)
        outputs = Set(try session.outputNames())
    }

    /// rgb: 3 bytes a pixel, row by row, of any size; upright: turn the photo as its EXIF says first (a CGContext drawn
    /// into gives 4 bytes a pixel: leave every fourth out). beam: 1 is greedy, up to 64.
    public func caption(rgb: Data, width: Int, height: Int, beam: Int64 = 1) throws -> Caption {
        precondition(width > 0 && height > 0 && rgb.count == width * height * 3, "not \(width) × \(height) RGB pixels")
        let shape = [height, width, 3].map { NSNumber(value: $0) }
        let image = try ORTValue(tensorData: NSMutableData(data: rgb), elementType: .uInt8, shape: shape)
        var rows = beam  // and, if wanted, "max_length", another Int64
        let scalar = NSMutableData(bytes: &rows, length: MemoryLayout<Int64>.size)
        let beams = try ORTValue(tensorData: scalar, elementType: .int64, shape: [])
        let inputs = ["image": image, "beam": beams]
        let found = try session.run(withInputs: inputs, outputNames: outputs, runOptions: nil)
        let ids: [Int64] = try numbers(found["ids"]!)
        let logprob: [Float] = try numbers(found["logprob"]!)
        return Caption(text: try found["text"]?.tensorStringData()[0], ids: ids, logprob: logprob[0])
    }

    private func numbers<T>(_ value: ORTValue) throws -> [T] {
        let data = try value.tensorData()  // belongs to the value: copied before that goes
        return Array(UnsafeBufferPointer(
            start: data.bytes.assumingMemoryBound(to: T.self), count: data.length / MemoryLayout<T>.stride))
    }
}
