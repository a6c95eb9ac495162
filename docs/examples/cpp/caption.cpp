// A photo's caption from the fused.onnx of a bundle (edgecap export --fused), with ONNX Runtime and nothing else.
//
//   g++ -std=c++17 -O2 caption.cpp -I ORT/include -L ORT/lib -lonnxruntime -Wl,-rpath,ORT/lib -o caption
//   ./caption a.edgecap/fused.onnx photo.ppm [BEAM]
//
// The picture is upright RGB of any size, here a binary PPM (P6): decoding JPEG and turning it as EXIF says is the
// app's part (libjpeg-turbo, stb_image, or the system's own decoder).

#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
  int64_t height, width;
  std::vector<uint8_t> rgb;  // [height, width, 3]
};

struct Caption {
  std::string text;  // empty where the graph leaves it to tokenizer.json (see docs/export.md)
  std::vector<int64_t> ids;
  float logprob;
};

// One model, loaded once; any number of threads may ask it at the same time.
class Captioner {
 public:
  explicit Captioner(const std::filesystem::path& fused, int threads = 1)
      : env_(ORT_LOGGING_LEVEL_ERROR, "edgecap"), session_(start(env_, fused, threads)) {}

  // beam: 1 is greedy, up to 64.
  Caption operator()(Picture& picture, int64_t beam = 1) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const std::array<int64_t, 3> shape{picture.height, picture.width, 3};
    std::array<Ort::Value, 2> inputs{
        Ort::Value::CreateTensor<uint8_t>(memory, picture.rgb.data(), picture.rgb.size(), shape.data(), shape.size()),
        Ort::Value::CreateTensor<int64_t>(memory, &beam, 1, nullptr, 0),
    };
    const char* const given[] = {"image", "beam"};  // and, if wanted, "max_length", as beam
    const char* const wanted[] = {"ids", "logprob", "text"};
    const size_t count = session_.GetOutputCount();  // 2 without "text"
    const auto found = session_.Run(Ort::RunOptions{nullptr}, given, inputs.data(), inputs.size(), wanted, count);

    const int64_t* ids = found[0].GetTensorData<int64_t>();
    const size_t length = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
    return {count > 2 ? found[2].GetStringTensorElement(0) : "", {ids, ids + length}, *found[1].GetTensorData<float>()};
  }

 private:
  static Ort::Session start(Ort::Env& env, const std::filesystem::path& fused, int threads) {
    env.DisableTelemetryEvents();  // official builds send some otherwise
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    return Ort::Session(env, fused.c_str(), options);
  }

  Ort::Env env_;
  Ort::Session session_;
};

// On to the next field of a PPM's header: blanks, and comments from # to the end of their line, are left out.
std::istream& onward(std::istream& file) {
  while ((file >> std::ws).peek() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  return file;
}

Picture read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0;
  int most = 0;
  file >> kind >> onward >> width >> onward >> height >> onward >> most;
  file.get();  // one blank
  if (!file || kind != "P6" || most != 255 || width < 1 || height < 1 || width > 32768 || height > 32768)
    throw std::runtime_error(path + ": not a binary PPM (P6, 255)");
  Picture picture{height, width, std::vector<uint8_t>(static_cast<size_t>(width * height * 3))};
  file.read(reinterpret_cast<char*>(picture.rgb.data()), static_cast<std::streamsize>(picture.rgb.size()));
  if (!file) throw std::runtime_error(path + ": truncated");
  return picture;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: caption fused.onnx photo.ppm [BEAM]\n";
    return 2;
  }
  try {
    Captioner captioner(argv[1]);
    Picture picture = read_ppm(argv[2]);
    const Caption caption = captioner(picture, argc > 3 ? std::atoi(argv[3]) : 1);
    std::cout << caption.text << "\nlogprob " << caption.logprob << "\nids";
    for (const int64_t id : caption.ids) std::cout << ' ' << id;
    std::cout << '\n';
  } catch (const std::exception& error) {  // Ort::Exception is one
    std::cerr << error.what() << '\n';
    return 1;
  }
}
