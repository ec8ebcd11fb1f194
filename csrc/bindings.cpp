// The native module: plain functions on addresses, sizes, strides and codes. Python has checked
// shapes, dtypes and devices by the time these are called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dot.h"
#include "cpu/modulated_linear.h"

namespace py = pybind11;

namespace {

const void* address(uintptr_t value) { return reinterpret_cast<const void*>(value); }

fssa::DType dtype(int code) {
  if (code < 0 || code > 1) throw py::value_error("dtype: expected 0 (fp32) or 1 (bf16)");
  return static_cast<fssa::DType>(code);
}

void modulated_linear(uintptr_t y, uintptr_t x, int64_t x_stride, int x_dtype, uintptr_t weight,
                      int64_t weight_stride, uintptr_t bias, uintptr_t lora_a,
                      int64_t lora_a_user_stride, int64_t lora_a_stride, int lora_a_dtype,
                      uintptr_t lora_b, int64_t lora_b_user_stride, int64_t lora_b_stride,
                      int lora_b_dtype, uintptr_t rows, int64_t rows_stride, int rows_dtype,
                      uintptr_t slots, int64_t num_tokens, int64_t in_features, int64_t rank,
                      int64_t num_users, const std::vector<int64_t>& splits, int family,
                      int epilogue, int num_threads) {
  const fssa::DType activation = dtype(x_dtype);
  fssa::cpu::ModulatedLinearArgs args;
  args.y = reinterpret_cast<void*>(y);
  args.x = {address(x), activation, x_stride, 0};
  args.weight = {address(weight), activation, weight_stride, 0};
  args.bias = {address(bias), activation, 0, 0};
  args.lora_a = {address(lora_a), dtype(lora_a_dtype), lora_a_stride, lora_a_user_stride};
  args.lora_b = {address(lora_b), dtype(lora_b_dtype), lora_b_stride, lora_b_user_stride};
  args.rows = {address(rows), dtype(rows_dtype), rows_stride, 0};
  args.slots = static_cast<const int32_t*>(address(slots));
  args.num_tokens = num_tokens;
  args.in_features = in_features;
  args.rank = rank;
  args.num_users = num_users;
  args.splits = splits;
  args.family = static_cast<fssa::cpu::Family>(family);
  args.epilogue = static_cast<fssa::cpu::Epilogue>(epilogue);
  args.num_threads = num_threads;
  py::gil_scoped_release release;
  fssa::cpu::modulated_linear(args);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of fssa_kernels; call them through fssa_kernels only.";
  m.def("instruction_set", &fssa::cpu::instruction_set,
        "The instruction set the CPU kernels were chosen for: avx512, avx2 or portable.");
  m.def("modulated_linear", &modulated_linear, py::arg("y"), py::arg("x"), py::arg("x_stride"),
        py::arg("x_dtype"), py::arg("weight"), py::arg("weight_stride"), py::arg("bias"),
        py::arg("lora_a"), py::arg("lora_a_user_stride"), py::arg("lora_a_stride"),
        py::arg("lora_a_dtype"), py::arg("lora_b"), py::arg("lora_b_user_stride"),
        py::arg("lora_b_stride"), py::arg("lora_b_dtype"), py::arg("rows"), py::arg("rows_stride"),
        py::arg("rows_dtype"), py::arg("slots"), py::arg("num_tokens"), py::arg("in_features"),
        py::arg("rank"), py::arg("num_users"), py::arg("splits"), py::arg("family"),
        py::arg("epilogue"), py::arg("num_threads"));
}
