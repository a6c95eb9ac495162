// What docs/examples/swift uses of ONNX Runtime's Objective-C API, as Swift sees it, over its C API: so that the example
// compiles and runs where there is Swift but no Apple system. Never shipped.
import COnnxRuntime
import Foundation

private let api = OrtGetApiBase()!.pointee.GetApi!(18)!.pointee

private func check(_ status: OrtStatusPtr?) throws {
    guard let status else { return }
    let message = String(cString: api.GetErrorMessage!(status)!)
    api.ReleaseStatus!(status)
    throw NSError(domain: "onnxruntime", code: 1, userInfo: [NSLocalizedDescriptionKey: message])
}

public enum ORTLoggingLevel: Int32 { case verbose, info, warning, error, fatal }
public enum ORTTensorElementDataType: Int32 {
    case undefined, float, int8, uInt8, int32, uInt32, int64, uInt64, string
}

public class ORTEnv {
    let pointer: OpaquePointer
    public init(loggingLevel: ORTLoggingLevel) throws {
        var made: OpaquePointer?
        try check(api.CreateEnv!(OrtLoggingLevel(UInt32(loggingLevel.rawValue)), "stand-in", &made))
        pointer = made!
    }
}

public class ORTSessionOptions {
    let pointer: OpaquePointer
    public init() throws {
        var made: OpaquePointer?
        try check(api.CreateSessionOptions!(&made))
        pointer = made!
    }
    public func setIntraOpNumThreads(_ threads: Int32) throws { try check(api.SetIntraOpNumThreads!(pointer, threads)) }
}

public class ORTRunOptions {}

public class ORTValue {
    let pointer: OpaquePointer
    let held: NSMutableData?
    init(_ pointer: OpaquePointer) { (self.pointer, held) = (pointer, nil) }
    deinit { api.ReleaseValue!(pointer) }

    public init(tensorData: NSMutableData, elementType: ORTTensorElementDataType, shape: [NSNumber]) throws {
        let kinds = [ORTTensorElementDataType.uInt8: ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                     .int64: ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64]
        var memory: OpaquePointer?, made: OpaquePointer?
        try check(api.CreateCpuMemoryInfo!(OrtArenaAllocator, OrtMemTypeDefault, &memory))
        defer { api.ReleaseMemoryInfo!(memory) }
        let sizes = shape.map { $0.int64Value }
        try check(api.CreateTensorWithDataAsOrtValue!(
            memory, tensorData.mutableBytes, tensorData.length, sizes, sizes.count, kinds[elementType]!, &made))
        (pointer, held) = (made!, tensorData)
    }

    private func count() throws -> Int {
        var info: OpaquePointer?, count = 0
        try check(api.GetTensorTypeAndShape!(pointer, &info))
        defer { api.ReleaseTensorTypeAndShapeInfo!(info) }
        try check(api.GetTensorShapeElementCount!(info, &count))
        return count
    }

    public func tensorData() throws -> NSMutableData {
        var data: UnsafeMutableRawPointer?, info: OpaquePointer?
        try check(api.GetTensorMutableData!(pointer, &data))
        try check(api.GetTensorTypeAndShape!(pointer, &info))
        defer { api.ReleaseTensorTypeAndShapeInfo!(info) }
        var kind = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
        try check(api.GetTensorElementType!(info, &kind))
        let bytes = kind == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 8
        return NSMutableData(bytesNoCopy: data!, length: try count() * bytes, freeWhenDone: false)
    }

    public func tensorStringData() throws -> [String] {
        try (0..<count()).map { index in
            var length = 0
            try check(api.GetStringTensorElementLength!(pointer, index, &length))
            var bytes = [UInt8](repeating: 0, count: length)
            try check(api.GetStringTensorElement!(pointer, length, index, &bytes))
            return String(decoding: bytes, as: UTF8.self)
        }
    }
}

public class ORTSession {
    let pointer: OpaquePointer
    let env: ORTEnv
    public init(env: ORTEnv, modelPath: String, sessionOptions: ORTSessionOptions?) throws {
        var made: OpaquePointer?
        try check(api.CreateSession!(env.pointer, modelPath, sessionOptions!.pointer, &made))
        (pointer, self.env) = (made!, env)
    }

    public func outputNames() throws -> [String] {
        var count = 0, allocator: UnsafeMutablePointer<OrtAllocator>?
        try check(api.SessionGetOutputCount!(pointer, &count))
        try check(api.GetAllocatorWithDefaultOptions!(&allocator))
        return try (0..<count).map { index in
            var name: UnsafeMutablePointer<CChar>?
            try check(api.SessionGetOutputName!(pointer, index, allocator, &name))
            defer { _ = api.AllocatorFree!(allocator, name) }
            return String(cString: name!)
        }
    }

    public func run(
        withInputs inputs: [String: ORTValue], outputNames: Set<String>, runOptions: ORTRunOptions?
    ) throws -> [String: ORTValue] {
        let given = Array(inputs.keys), wanted = Array(outputNames)
        let names = (given + wanted).map { strdup($0) }
        defer { names.forEach { free($0) } }
        let pointers = names.map { UnsafePointer($0) }
        var found = [OpaquePointer?](repeating: nil, count: wanted.count)
        try check(api.Run!(
            pointer, nil, Array(pointers[..<given.count]), given.map { inputs[$0]!.pointer }, given.count,
            Array(pointers[given.count...]), wanted.count, &found))
        return Dictionary(uniqueKeysWithValues: zip(wanted, found.map { ORTValue($0!) }))
    }
}
