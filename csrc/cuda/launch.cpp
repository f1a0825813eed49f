// cuda_launch: a kernel of csrc/cuda/kernels by name, on a stream of the caller's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "driver.h"
#include "images.h"
#include "launch.h"

namespace py = pybind11;

namespace qwenopt {
namespace {

void check_driver(CuResult code, const std::string& what) {
  if (code == 0) return;
  const char* text = nullptr;
  cuda_driver().error_string(code, &text);
  throw std::runtime_error(
      join("cuda: ", what, ": ", text != nullptr ? text : "unknown error", " (CUDA error ", code, ")"));
}

// The primary context of a device, which torch uses too, current on this thread as long as this lives.
class Current {
 public:
  explicit Current(CuContext context) { check_driver(cuda_driver().push(context), "cuCtxPushCurrent"); }
  ~Current() {
    CuContext old;
    cuda_driver().pop(&old);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

// Contexts, modules and functions as they are first asked for; kept to the end of the process.
class Loaded {
 public:
  std::pair<CuContext, CuFunction> function(int device, const std::string& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto key = std::make_pair(device, kernel);
    const auto found = functions_.find(key);
    const CuContext own = context(device);
    if (found != functions_.end()) return {own, found->second};
    const int image = image_of(kernel);
    const Current current(own);
    CuFunction made;
    check_driver(cuda_driver().function(&made, module(device, image), kernel.c_str()), "kernel " + kernel);
    functions_[key] = made;
    return {own, made};
  }

 private:
  static int image_of(const std::string& kernel) {
    for (int i = 0; i < kNumCudaKernels; ++i) {
      if (kernel == kCudaKernels[i].name) return kCudaKernels[i].image;
    }
    throw std::invalid_argument(join("cuda: no kernel ", kernel, "; this module has ", kNumCudaKernels));
  }
  CuContext context(int device) {
    CuContext& own = contexts_[device];
    if (own == nullptr) {
      CuDevice handle;
      check_driver(cuda_driver().device(&handle, device), join("device ", device));
      check_driver(cuda_driver().retain(&own, handle), join("context of device ", device));
    }
    return own;
  }
  CuModule module(int device, int image) {
    CuModule& own = modules_[{device, image}];
    if (own == nullptr) {
      const std::string what =
          join("loading ", kCudaImages[image].name, " (built by nvcc ", kCudaVersion, ") on device ", device);
      check_driver(cuda_driver().load(&own, kCudaImages[image].bytes), what);
    }
    return own;
  }

  std::mutex mutex_;
  std::map<int, CuContext> contexts_;
  std::map<std::pair<int, int>, CuModule> modules_;
  std::map<std::pair<int, std::string>, CuFunction> functions_;
};

void cuda_launch(const std::string& kernel, std::tuple<unsigned, unsigned, unsigned> grid, unsigned threads,
                 const std::string& args, int device, uintptr_t stream) {
  QWENOPT_CHECK(cuda_driver().missing.empty(), "cuda: ", cuda_driver().missing);
  QWENOPT_CHECK(!args.empty() && args.size() % 8 == 0, "cuda: ", kernel, " with ", args.size(),
                " bytes of arguments; every field has 8");
  static Loaded loaded;
  const auto [context, function] = loaded.function(device, kernel);
  const auto [x, y, z] = grid;
  std::vector<uint64_t> copy(args.size() / 8);  // aligned as the struct is
  std::memcpy(copy.data(), args.data(), args.size());
  void* params[] = {copy.data()};
  const Current current(context);
  check_driver(
      cuda_driver().launch(function, x, y, z, threads, 1, 1, 0, reinterpret_cast<CuStream>(stream), params, nullptr),
      join(kernel, " on device ", device));
}

// Why no kernel can be started, or None.
py::object cuda_missing() {
  if (kNumCudaImages == 0) return py::str("qwenopt._C was built without CUDA: nvcc was not there");
  const CudaDriver& driver = cuda_driver();
  if (!driver.missing.empty()) return py::str(driver.missing);
  int version = 0;
  driver.version(&version);
  if (version / 1000 < std::atoi(kCudaVersion)) {
    return py::str(join("the driver is for CUDA ", version / 1000, ".", version % 1000 / 10, ", the kernels of ",
                        "qwenopt._C were built by nvcc ", kCudaVersion,
                        "; update the driver, or build with an older nvcc"));
  }
  return py::none();
}

std::vector<std::string> cuda_kernels() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumCudaKernels; ++i) names.emplace_back(kCudaKernels[i].name);
  return names;
}

}  // namespace

void register_cuda(py::module_& m) {
  m.def("cuda_launch", &cuda_launch, "start a CUDA kernel", py::arg("kernel"), py::arg("grid"), py::arg("threads"),
        py::arg("args"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("cuda_missing", &cuda_missing, "why no CUDA kernel can be started, or None");
  m.def("cuda_kernels", &cuda_kernels, "the CUDA kernels that are built in");
}

}  // namespace qwenopt
