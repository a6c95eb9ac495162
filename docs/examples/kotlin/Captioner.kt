// A photo's caption on Android from the fused.onnx of a bundle (edgecap export --fused), with ONNX Runtime alone.
//
//   dependencies { implementation("com.microsoft.onnxruntime:onnxruntime-android:1.24.3") }   // build.gradle.kts
//
//   val captioner = Captioner(File(filesDir, "fused.onnx").path)   // once; from assets, copy it there first
//   val pixels = IntArray(bitmap.width * bitmap.height)
//   bitmap.getPixels(pixels, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
//   val text = captioner.caption(pixels, bitmap.width, bitmap.height).text   // not on the main thread

package edgecap

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.ByteBuffer

/** text: null where the graph leaves it to tokenizer.json (see docs/export.md). logprob: natural logarithm, at most 0. */
class Caption(val text: String?, val ids: LongArray, val logprob: Float)

/** One model, loaded once; any number of threads may ask it at the same time. */
class Captioner(fused: String, threads: Int = 2) : AutoCloseable {
    private val environment: OrtEnvironment = OrtEnvironment.getEnvironment().apply { setTelemetry(false) }
    private val session: OrtSession = OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(threads)
        environment.createSession(fused, options)
    }

    /**
     * pixels: 0xAARRGGBB row by row, as Bitmap.getPixels gives them, of any size; upright: turn the photo as its EXIF
     * says first. beam: 1 is greedy, up to 64. Throws OrtException.
     */
    fun caption(pixels: IntArray, width: Int, height: Int, beam: Long = 1): Caption {
        require(width > 0 && height > 0 && pixels.size == width * height) { "not $width × $height pixels" }
        val rgb = ByteBuffer.allocateDirect(3 * pixels.size)
        for (pixel in pixels) rgb.put((pixel shr 16).toByte()).put((pixel shr 8).toByte()).put(pixel.toByte())
        rgb.rewind()
        val shape = longArrayOf(height.toLong(), width.toLong(), 3)
        OnnxTensor.createTensor(environment, rgb, shape, OnnxJavaType.UINT8).use { image ->
            OnnxTensor.createTensor(environment, beam).use { rows -> // and, if wanted, "max_length", another Long
                session.run(mapOf("image" to image, "beam" to rows)).use { found ->
                    val text = found.get("text").map { (it.value as Array<*>)[0] as String }
                    val ids = found.get("ids").get().value as LongArray
                    return Caption(text.orElse(null), ids, found.get("logprob").get().value as Float)
                }
            }
        }
    }

    override fun close() = session.close()
}
