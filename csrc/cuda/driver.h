// The few functions of the CUDA driver that starting a kernel takes, found at run time: nothing of CUDA is linked, so
// the module loads where there is no driver.
#pragma once

#include <string>

namespace qwenopt {

using CuResult = int;
using CuDevice = int;
using CuContext = void*;
using CuModule = void*;
using CuFunction = void*;
using CuStream = void*;

struct CudaDriver {
  CuResult (*init)(unsigned);
  CuResult (*version)(int*);
  CuResult (*error_string)(CuResult, const char**);
  CuResult (*device)(CuDevice*, int);
  CuResult (*retain)(CuContext*, CuDevice);
  CuResult (*push)(CuContext);
  CuResult (*pop)(CuContext*);
  CuResult (*load)(CuModule*, const void*);
  CuResult (*function)(CuFunction*, CuModule, const char*);
  CuResult (*launch)(CuFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CuStream, void**,
                     void**);
  std::string missing;  // why it cannot be used; empty where it can
};

// Loaded at the first call; never fails, but says in `missing` what is.
const CudaDriver& cuda_driver();

}  // namespace qwenopt
