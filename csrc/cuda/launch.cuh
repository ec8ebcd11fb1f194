// How kernels are launched: by CUDA's runtime, or by the emulation.
#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#endif

#include <stdexcept>
#include <string>

#include "numbers.cuh"
#include "platform.cuh"

namespace fssa::cuda {

struct Grid {
  int x = 1, y = 1, z = 1;
};

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// What the tensor copy engine has to know of a matrix whose rows are `stride` numbers apart: it is
// copied in boxes of `box_rows` rows of 64 numbers.
inline TileMap map_tiles(DType dtype, const void* base, int64_t rows, int64_t columns,
                         int64_t stride, int box_rows) {
  // The driver's function, of whatever version; the module is not linked with the driver.
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                         cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("cuTensorMapEncodeTiled: the driver does not have it");
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * stride)};
  const cuuint32_t box[] = {kTileRowBytes / 2, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  TileMap map;
  static_assert(sizeof(CUtensorMap) == sizeof(TileMap) && alignof(CUtensorMap) <= alignof(TileMap));
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      reinterpret_cast<CUtensorMap*>(&map),
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  }
  return map;
}

template <typename Arguments>
void launch(const char* name, void (*kernel)(Arguments), Grid grid, int threads, int shared_bytes,
            uintptr_t stream, const Arguments& arguments) {
  // More than this only by asking; asking costs less than finding out whether one has asked.
  if (shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          name);
  }
  Arguments copy = arguments;
  void* parameters[] = {&copy};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z),
                         dim3(threads), parameters, shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
}

#else

inline TileMap map_tiles(DType, const void* base, int64_t rows, int64_t columns, int64_t stride,
                         int box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || stride % 8 || box_rows > 256) {
    throw std::runtime_error("emulation: a matrix that cannot be copied in tiles");
  }
  TileMap map{};
  const emulation::Matrix matrix{static_cast<const char*>(base), columns, rows, 2 * stride,
                                 box_rows};
  std::memcpy(&map, &matrix, sizeof matrix);
  return map;
}

template <typename Arguments>
void launch(const char*, void (*kernel)(Arguments), Grid grid, int threads, int shared_bytes,
            uintptr_t, const Arguments& arguments) {
  emulation::machine().launch(grid.x, grid.y, grid.z, threads, shared_bytes,
                              [&] { kernel(arguments); });
}

#endif

// visit(T{}) for the 16-bit type that a code names.
template <typename Visit>
void with_half_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kBFloat16: return visit(BF16{});
    case DType::kFloat16: return visit(FP16{});
    default: throw std::invalid_argument("dtype: expected bfloat16 or float16");
  }
}

}  // namespace fssa::cuda
