#include "driver.h"

#include <dlfcn.h>

namespace qwenopt {
namespace {

template <class Fn>
void find(void* library, const char* name, Fn** fn, std::string* missing) {
  *fn = reinterpret_cast<Fn*>(dlsym(library, name));
  if (*fn == nullptr && missing->empty()) {
    *missing = std::string("the CUDA driver has no ") + name + "; it is too old";
  }
}

CudaDriver load() {
  CudaDriver d{};
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    d.missing = "no CUDA driver (libcuda.so.1)";
    return d;
  }
  find(library, "cuInit", &d.init, &d.missing);
  find(library, "cuDriverGetVersion", &d.version, &d.missing);
  find(library, "cuGetErrorString", &d.error_string, &d.missing);
  find(library, "cuDeviceGet", &d.device, &d.missing);
  find(library, "cuDevicePrimaryCtxRetain", &d.retain, &d.missing);
  find(library, "cuCtxPushCurrent_v2", &d.push, &d.missing);
  find(library, "cuCtxPopCurrent_v2", &d.pop, &d.missing);
  find(library, "cuModuleLoadData", &d.load, &d.missing);
  find(library, "cuModuleGetFunction", &d.function, &d.missing);
  find(library, "cuLaunchKernel", &d.launch, &d.missing);
  if (d.missing.empty()) {
    const CuResult code = d.init(0);
    const char* text = nullptr;
    if (code != 0) {
      d.error_string(code, &text);
      d.missing = std::string("the CUDA driver does not start: ") + (text != nullptr ? text : "unknown error");
    }
  }
  return d;
}

}  // namespace

const CudaDriver& cuda_driver() {
  static const CudaDriver driver = load();
  return driver;
}

}  // namespace qwenopt
