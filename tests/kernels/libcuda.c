// The driver's functions that Triton calls on the way to a launch, for a machine without a GPU. A kernel is not run: what
// it would be run with is held to the rules of the CUDA driver API, for a GPU of the limits given at compile time.
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifndef SHARED_LIMIT
#define SHARED_LIMIT 101376
#endif

static char refusal[256] = "no error";
static int launches, maps;

int launches_so_far(void) { return launches; }
int maps_so_far(void) { return maps; }

static CUresult refuse(const char *what, long long value) {
  snprintf(refusal, sizeof refusal, "%s: %lld", what, value);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error ? refusal : "no error";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK         ? 49152
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? SHARED_LIMIT
           : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                         ? 32
                                                                                : 1;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return memcmp(image, "\177ELF", 4) ? refuse("not a cubin", 0) : CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > SHARED_LIMIT)
    return refuse("dynamic shared memory", value);
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

// CUDA driver API, "Tensor Map Object Management".
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const int spans[] = {1 << 30, 32, 64, 128};  // bytes that a swizzle can span: none, 32, 64, 128
  if ((uintptr_t)map % 64) return refuse("a map must lie at a multiple of 64 bytes, it lies at", (intptr_t)map);
  if (type >= sizeof sizes / sizeof *sizes || swizzle >= sizeof spans / sizeof *spans) return refuse("type", type);
  long long size = sizes[type];
  if (rank < 1 || rank > 5) return refuse("rank", rank);
  if ((uintptr_t)address % 16) return refuse("address", (intptr_t)address);
  for (cuuint32_t i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) return refuse("extent", dims[i]);
    if (box[i] < 1 || box[i] > 256) return refuse("extent of the box", box[i]);
    if (steps[i] < 1 || steps[i] > 8) return refuse("step", steps[i]);
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return refuse("stride", strides[i]);
  }
  if (box[0] * size % 16) return refuse("bytes of a row of the box", box[0] * size);
  if (box[0] * size > spans[swizzle]) return refuse("bytes of a row of the box, more than are swizzled", box[0] * size);
  maps++;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (!function) return refuse("no function", 0);
  if (config->gridDimX < 1 || config->gridDimX > 2147483647u) return refuse("blocks along x", config->gridDimX);
  if (config->gridDimY < 1 || config->gridDimY > 65535) return refuse("blocks along y", config->gridDimY);
  if (config->gridDimZ < 1 || config->gridDimZ > 65535) return refuse("blocks along z", config->gridDimZ);
  if (config->blockDimX < 32 || config->blockDimX > 1024) return refuse("threads", config->blockDimX);
  if (config->sharedMemBytes > SHARED_LIMIT) return refuse("shared memory", config->sharedMemBytes);
  launches++;
  return CUDA_SUCCESS;
}
