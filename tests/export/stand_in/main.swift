// For the test: main fused.onnx pixels.rgb WIDTH HEIGHT BEAM prints text, log-probability and ids.
import Foundation

let arguments = CommandLine.arguments
let captioner = try Captioner(path: arguments[1])
let rgb = FileManager.default.contents(atPath: arguments[2])!
let caption = try captioner.caption(
    rgb: rgb, width: Int(arguments[3])!, height: Int(arguments[4])!, beam: Int64(arguments[5])!)
print(caption.text ?? "")
print("logprob", caption.logprob)
print("ids", caption.ids.map(String.init).joined(separator: " "))
