// Memory that the ranks of one node map into each other's address space, by CUDA's inter-process handles. Functions return the CUDA error
// code, 0 for success.

#include <cstdint>
#include <cuda_runtime.h>

#define SCALEMOE_API extern "C" __attribute__((visibility("default")))

// Zeroed memory on the current device, and the handle by which others open it (cudaIpcMemHandle_t, 64 bytes).
SCALEMOE_API int scalemoe_cuda_shared_create(int64_t bytes, void** pointer, cudaIpcMemHandle_t* handle) {
  cudaError_t error = cudaMalloc(pointer, static_cast<size_t>(bytes));
  if (error != cudaSuccess) return error;
  error = cudaMemset(*pointer, 0, static_cast<size_t>(bytes));
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaIpcGetMemHandle(handle, *pointer);
  if (error != cudaSuccess) {
    cudaFree(*pointer);
    *pointer = nullptr;
  }
  return error;
}

SCALEMOE_API int scalemoe_cuda_shared_open(const cudaIpcMemHandle_t* handle, void** pointer) {
  return cudaIpcOpenMemHandle(pointer, *handle, cudaIpcMemLazyEnablePeerAccess);
}

SCALEMOE_API int scalemoe_cuda_shared_close(void* pointer) { return cudaIpcCloseMemHandle(pointer); }

SCALEMOE_API int scalemoe_cuda_shared_free(void* pointer) { return cudaFree(pointer); }

// What a CUDA error code means.
SCALEMOE_API const char* scalemoe_cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
