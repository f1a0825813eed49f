/* A CUDA driver that only takes notes, for test_driver.py: what it is asked for goes to stdout. FAKE_FAIL names the
   call that fails, with "out of memory"; FAKE_VERSION is the version of CUDA that it is for. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int depth = 0;

static int note(const char* call) {
  const char* fails = getenv("FAKE_FAIL");
  return fails != NULL && strcmp(fails, call) == 0 ? 2 : 0;
}

int cuInit(unsigned flags) { return note("init") + (int)flags; }
int cuDriverGetVersion(int* version) {
  const char* given = getenv("FAKE_VERSION");
  *version = given != NULL ? atoi(given) : 99000;
  return 0;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 2 ? "out of memory" : NULL;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return note("device");
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  printf("retain %d\n", device);
  *context = (char*)0 + 100 + device;
  return note("retain");
}
int cuCtxPushCurrent_v2(void* context) {
  ++depth;
  return context == NULL;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = NULL;
  --depth;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  unsigned magic;
  memcpy(&magic, image, 4);
  printf("load %x depth %d\n", magic, depth);
  *module = (void*)image;
  return note("load");
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  printf("function %s\n", name);
  *function = module;
  return note("function");
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
  const long long* args = params[0];
  printf("launch %u %u %u, %u %u %u, shared %u, stream %lld, args %lld %lld, depth %d\n", x, y, z, bx, by, bz, shared,
         (long long)(size_t)stream, args[0], args[9], depth);
  fflush(stdout);
  return function == NULL || extra != NULL ? 1 : note("launch");
}
