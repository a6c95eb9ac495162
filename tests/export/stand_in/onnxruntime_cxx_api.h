// What docs/examples/cpp uses of ONNX Runtime's C++ API, for machines that have its library (every Python wheel holds
// it) but not its headers. Below it lies the table of functions that the library's one entry point hands out; the
// places in it are part of ONNX Runtime's ABI and never change. test_apps.py compares them with the real header where
// that is installed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

using Function = void (*)();
struct OrtApiBase {
  const Function* (*get_api)(uint32_t version);
  const char* (*get_version)();
};
extern "C" const OrtApiBase* OrtGetApiBase();

// (name, place): the test reads this list.
#define EDGECAP_ORT_PLACES(at)                                                                                        \
  at(GetErrorMessage, 2) at(CreateEnv, 3) at(DisableTelemetryEvents, 6) at(CreateSession, 7) at(Run, 9)               \
  at(CreateSessionOptions, 10) at(SetIntraOpNumThreads, 24) at(SessionGetOutputCount, 31)                             \
  at(CreateTensorWithDataAsOrtValue, 49) at(GetTensorMutableData, 51) at(GetTensorShapeElementCount, 64)              \
  at(GetTensorTypeAndShape, 65) at(CreateCpuMemoryInfo, 69) at(ReleaseEnv, 92) at(ReleaseStatus, 93)                  \
  at(ReleaseMemoryInfo, 94) at(ReleaseSession, 95) at(ReleaseValue, 96) at(ReleaseTensorTypeAndShapeInfo, 99)         \
  at(ReleaseSessionOptions, 100) at(GetStringTensorElementLength, 127) at(GetStringTensorElement, 128)

namespace Ort {

#define EDGECAP_PLACE(name, place) name = place,
enum Place : size_t { EDGECAP_ORT_PLACES(EDGECAP_PLACE) };
#undef EDGECAP_PLACE

struct Exception : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Result, typename... Arguments>
Result call(Place place, Arguments... arguments) {
  static const Function* const table = OrtGetApiBase()->get_api(18);  // the oldest that a bundle may ask for
  return reinterpret_cast<Result (*)(Arguments...)>(table[place])(arguments...);
}

template <typename... Arguments>
void check(Place place, Arguments... arguments) {
  if (void* const status = call<void*>(place, arguments...)) {
    const std::string message = call<const char*>(GetErrorMessage, static_cast<const void*>(status));
    call<void>(ReleaseStatus, status);
    throw Exception(message);
  }
}

// An object of the library's, and who frees it.
template <Place release>
struct Held {
  void* pointer = nullptr;
  Held() = default;
  Held(Held&& other) noexcept : pointer(std::exchange(other.pointer, nullptr)) {}
  ~Held() {
    if (pointer) call<void>(release, pointer);
  }
};

struct Env : Held<ReleaseEnv> {
  Env(OrtLoggingLevel level, const char* id) { check(CreateEnv, static_cast<int>(level), id, &pointer); }
  void DisableTelemetryEvents() { check(Place::DisableTelemetryEvents, static_cast<const void*>(pointer)); }
};

struct SessionOptions : Held<ReleaseSessionOptions> {
  SessionOptions() { check(CreateSessionOptions, &pointer); }
  void SetIntraOpNumThreads(int threads) { check(Place::SetIntraOpNumThreads, pointer, threads); }
};

struct MemoryInfo : Held<ReleaseMemoryInfo> {
  static MemoryInfo CreateCpu(OrtAllocatorType allocator, OrtMemType type) {
    MemoryInfo made;
    check(CreateCpuMemoryInfo, static_cast<int>(allocator), static_cast<int>(type), &made.pointer);
    return made;
  }
};

struct ShapeInfo : Held<ReleaseTensorTypeAndShapeInfo> {
  size_t GetElementCount() const {
    size_t count = 0;
    check(GetTensorShapeElementCount, static_cast<const void*>(pointer), &count);
    return count;
  }
};

template <typename T>
constexpr int element_type = 0;
template <>
inline constexpr int element_type<uint8_t> = 2;
template <>
inline constexpr int element_type<int64_t> = 7;

struct Value : Held<ReleaseValue> {
  template <typename T>
  static Value CreateTensor(const MemoryInfo& memory, T* data, size_t count, const int64_t* shape, size_t rank) {
    static_assert(element_type<T> != 0);
    Value made;
    check(CreateTensorWithDataAsOrtValue, static_cast<const void*>(memory.pointer), static_cast<void*>(data),
          count * sizeof(T), shape, rank, element_type<T>, &made.pointer);
    return made;
  }
  template <typename T>
  const T* GetTensorData() const {
    void* data = nullptr;
    check(GetTensorMutableData, pointer, &data);
    return static_cast<const T*>(data);
  }
  ShapeInfo GetTensorTypeAndShapeInfo() const {
    ShapeInfo made;
    check(GetTensorTypeAndShape, static_cast<const void*>(pointer), &made.pointer);
    return made;
  }
  std::string GetStringTensorElement(size_t index) const {
    size_t length = 0;
    check(GetStringTensorElementLength, static_cast<const void*>(pointer), index, &length);
    std::string text(length, '\0');
    check(Place::GetStringTensorElement, static_cast<const void*>(pointer), length, index,
          static_cast<void*>(text.data()));
    return text;
  }
};

struct RunOptions {
  explicit RunOptions(std::nullptr_t) {}
};

struct Session : Held<ReleaseSession> {
  Session(const Env& env, const char* path, const SessionOptions& options) {
    check(CreateSession, static_cast<const void*>(env.pointer), path, static_cast<const void*>(options.pointer),
          &pointer);
  }
  size_t GetOutputCount() const {
    size_t count = 0;
    check(SessionGetOutputCount, static_cast<const void*>(pointer), &count);
    return count;
  }
  std::vector<Value> Run(const RunOptions&, const char* const* given, const Value* inputs, size_t input_count,
                         const char* const* wanted, size_t output_count) {
    std::vector<const void*> feed(input_count);
    for (size_t i = 0; i < input_count; ++i) feed[i] = inputs[i].pointer;
    std::vector<void*> found(output_count);
    check(Place::Run, pointer, static_cast<const void*>(nullptr), given, static_cast<const void* const*>(feed.data()),
          input_count, wanted, output_count, found.data());
    std::vector<Value> values(output_count);
    for (size_t i = 0; i < output_count; ++i) values[i].pointer = found[i];
    return values;
  }
};

}  // namespace Ort
