package ai.onnxruntime;

public class OrtEnvironment implements AutoCloseable {
  public static OrtEnvironment getEnvironment() {
    return new OrtEnvironment();
  }

  public void setTelemetry(boolean send) throws OrtException {}

  public OrtSession createSession(String path, OrtSession.SessionOptions options) throws OrtException {
    throw new OrtException();
  }

  @Override
  public void close() {}
}
