package ai.onnxruntime;

import java.nio.ByteBuffer;

// The signatures that docs/examples/kotlin uses of ONNX Runtime's Java API, for its compiler alone: nothing here runs.
public class OnnxTensor extends OnnxTensorLike {
  public static OnnxTensor createTensor(OrtEnvironment env, Object data) throws OrtException {
    throw new OrtException();
  }

  public static OnnxTensor createTensor(OrtEnvironment env, ByteBuffer data, long[] shape, OnnxJavaType type)
      throws OrtException {
    throw new OrtException();
  }

  @Override
  public Object getValue() throws OrtException {
    throw new OrtException();
  }

  @Override
  public void close() {}
}
