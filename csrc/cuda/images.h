// The compiled CUDA kernels inside this module; setup.py writes the table (none where nvcc was not there).
#pragma once

namespace qwenopt {

struct CudaImage {
  const char* name;   // of the .cuh file
  const void* bytes;  // a fat binary: machine code for some devices, PTX for later ones
};

struct CudaKernelName {
  const char* name;
  int image;  // which of the images has it
};

extern const CudaImage kCudaImages[];
extern const int kNumCudaImages;
extern const char* const kCudaVersion;  // of nvcc, "13.0"; empty where there was none

extern const CudaKernelName kCudaKernels[];
extern const int kNumCudaKernels;

}  // namespace qwenopt
