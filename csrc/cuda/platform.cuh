// What device code needs of a GPU, in one place: where a thread stands, copies into shared memory,
// the matrix instruction, barriers.
//
// nvcc takes the instructions below. With FSSA_EMULATION any other compiler takes emulation.h,
// which has the same functions and runs the same kernels on a CPU, one thread of a block after
// another, so that they can be tested where there is no GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

// Of at most so many threads a block, of which so many blocks fit on a multiprocessor.
#define FSSA_GLOBAL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FSSA_DEVICE __device__ __forceinline__
#define FSSA_GRID_CONSTANT __grid_constant__

namespace fssa::cuda {

constexpr bool kEmulated = false;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasTileCopies = true;
#else
constexpr bool kHasTileCopies = false;
#endif

struct alignas(16) Words4 {
  uint32_t word[4];
};

FSSA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FSSA_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
FSSA_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FSSA_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FSSA_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// The block's dynamic shared memory.
FSSA_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

FSSA_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

FSSA_DEVICE void sync_block() { __syncthreads(); }

// Read once, so not worth a place in the first cache.
FSSA_DEVICE Words4 load_words(const void* source) {
  const uint4 value = __ldg(static_cast<const uint4*>(source));
  return {{value.x, value.y, value.z, value.w}};
}

template <typename T>
FSSA_DEVICE T load(const T* source) {
  return *source;
}

// Past the first cache, which does not see what other multiprocessors have written.
FSSA_DEVICE float load_shared_by_blocks(const float* source) { return __ldcg(source); }

template <typename T>
FSSA_DEVICE void store(T* target, T value) {
  *target = value;
}

FSSA_DEVICE void store_words(void* target, const Words4& value) {
  *static_cast<uint4*>(target) =
      make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// What this thread wrote before is seen by whoever sees what it writes after.
FSSA_DEVICE void fence_device() { __threadfence(); }

FSSA_DEVICE int atomic_add(int* target, int value) { return atomicAdd(target, value); }

FSSA_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 1 / sqrt(value), rounded as a division and a root are.
FSSA_DEVICE float inverse_root(float value) { return __fdiv_rn(1.0f, __fsqrt_rn(value)); }

// Copies of 16 bytes that do not pass through registers; a thread's own come in groups.
FSSA_DEVICE void copy_async(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
               "l"(source)
               : "memory");
}

// The same, or 16 bytes of zeros.
FSSA_DEVICE void copy_async_or_zero(void* target, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(there ? 16 : 0)
               : "memory");
}

FSSA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for this thread's groups but the newest kPending.
template <int kPending>
FSSA_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// From sm_90 on: a barrier in shared memory that counts arrivals, and the bytes that the tensor
// copy engine brings.
FSSA_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Barriers initialised before this are known to the copy engine after the block's next barrier.
FSSA_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

FSSA_DEVICE void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity is over.
FSSA_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies a box of rows of 64 numbers, from column k of row `row` on, as layout.h says; what is
// outside of the matrix is zero. The barrier counts the box's bytes when they are there.
FSSA_DEVICE void copy_tile(void* target, const TileMap& map, int k, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(shared_address(target)),
      "l"(&map), "r"(k), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Four 8x8 matrices of 16-bit numbers, transposed: lane l names the address of row l % 8 of matrix
// l / 8, and gets of each matrix the elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
FSSA_DEVICE void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

FSSA_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

// bfloat16 and IEEE half, by their bits.
struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

FSSA_DEVICE float to_float(BF16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

FSSA_DEVICE float to_float(FP16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

FSSA_DEVICE void from_float(float value, BF16& result) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

FSSA_DEVICE void from_float(float value, FP16& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

// sum += a b for a [16,16] and b [16,8], both of T, and sum [16,8] in fp32. With g = lane / 4 and
// c = lane % 4 a lane holds, two numbers to a word,
//   a: rows (g, g + 8, g, g + 8), columns (2c, 2c, 2c + 8, 2c + 8) and the one after each;
//   b: rows (2c, 2c + 8) and the one after each, column g;
//   sum: rows (g, g, g + 8, g + 8), columns (2c, 2c + 1, 2c, 2c + 1).
template <typename T>
FSSA_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
FSSA_DEVICE void multiply_add<BF16>(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
FSSA_DEVICE void multiply_add<FP16>(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fssa::cuda

#elif defined(FSSA_EMULATION)
#include "emulation.h"
#else
#error "device code needs nvcc, or FSSA_EMULATION to run it on a CPU"
#endif
