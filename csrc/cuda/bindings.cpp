// The CUDA module: plain functions on addresses, sizes, strides and codes. Python has checked
// shapes, dtypes and devices by the time these are called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "epilogue.h"
#include "modulated_linear.h"
#include "paged_attention.h"
#include "residual_film_rms_norm.h"

#if defined(FSSA_EMULATION)
#include "platform.cuh"
#endif

namespace py = pybind11;
using namespace fssa::cuda;

namespace {

using Address = uintptr_t;

template <typename T>
const T* in(Address value) {
  return reinterpret_cast<const T*>(value);
}

template <typename T>
T* out(Address value) {
  return reinterpret_cast<T*>(value);
}

// (address, row stride, user stride, whether it is fp32)
using Side = std::tuple<Address, int64_t, int64_t, bool>;

LinearPlan modulated_linear_plan(const DeviceLimits& device, int num_tokens, int in_features,
                                 const std::vector<int>& splits, bool paired, int family,
                                 int rank) {
  return plan_linear(device, {num_tokens, in_features, splits, paired, static_cast<Family>(family),
                              rank});
}

void modulated_linear(const LinearPlan& plan, uintptr_t stream, int dtype, Address y,
                      Address partial, Address counters, Address x, int64_t stride_x,
                      Address weight, int64_t stride_w, Address bias, Address lora_a,
                      int64_t stride_a, const Side& lora_b, const Side& rows, Address low,
                      int64_t stride_low, Address slots, int num_tokens, int in_features,
                      const std::vector<int>& splits, int rank, int num_users, int family,
                      int epilogue) {
  LinearArguments args{};
  args.y = out<void>(y);
  args.partial = out<float>(partial);
  args.counters = out<int>(counters);
  args.x = in<void>(x);
  args.stride_x = stride_x;
  args.weight = in<void>(weight);
  args.stride_w = stride_w;
  args.bias = in<void>(bias);
  args.lora_a = in<void>(lora_a);
  args.stride_a = stride_a;
  args.lora_b = in<void>(std::get<0>(lora_b));
  args.stride_b = std::get<1>(lora_b);
  args.stride_b_user = std::get<2>(lora_b);
  args.lora_b_is_float = std::get<3>(lora_b);
  args.rows = in<void>(std::get<0>(rows));
  args.stride_rows = std::get<2>(rows);
  args.rows_is_float = std::get<3>(rows);
  args.low = in<float>(low);
  args.stride_low = stride_low;
  args.slots = in<int32_t>(slots);
  args.num_tokens = num_tokens;
  args.in_features = in_features;
  args.num_projections = static_cast<int>(splits.size());
  int end = 0;
  for (size_t s = 0; s < splits.size() && s < kMaxProjections; ++s) args.ends[s] = end += splits[s];
  args.epilogue = static_cast<Epilogue>(epilogue);
  args.out_columns = args.epilogue == Epilogue::kNone ? end : end / 2;
  args.rank = rank;
  args.num_users = num_users;
  args.family = static_cast<Family>(family);
  args.plan = plan;
  launch_linear(args, static_cast<DType>(dtype), stream);
}

void low_rank_input(uintptr_t stream, int dtype, Address low, int64_t stride_low, Address x,
                    int64_t stride_x, Address lora_a, int64_t stride_a, int64_t stride_a_user,
                    const Side& rows, Address slots, int num_tokens, int in_features,
                    int num_projections, int rank, int num_users, int family) {
  LowRankArguments args{};
  args.low = out<float>(low);
  args.stride_low = stride_low;
  args.x = in<void>(x);
  args.stride_x = stride_x;
  args.lora_a = in<void>(lora_a);
  args.stride_a = stride_a;
  args.stride_a_user = stride_a_user;
  args.rows = in<void>(std::get<0>(rows));
  args.stride_rows = std::get<2>(rows);
  args.rows_is_float = std::get<3>(rows);
  args.slots = in<int32_t>(slots);
  args.num_tokens = num_tokens;
  args.in_features = in_features;
  args.num_projections = num_projections;
  args.rank = rank;
  args.num_users = num_users;
  args.family = static_cast<Family>(family);
  launch_low_rank(args, static_cast<DType>(dtype), stream);
}

// (address, row stride, whether it is fp32, whether 16 bytes of it can be read at once)
using Vector = std::tuple<Address, int64_t, bool, bool>;

void residual_film_rms_norm(const NormPlan& plan, uintptr_t stream, int dtype, Address normed,
                            int64_t stride_normed, Address h, Address x, int64_t stride_x,
                            Address residual, int64_t stride_residual, const Vector& weight,
                            const Vector& film, Address lora_a, int64_t stride_a,
                            const Vector& gates, Address slots, int num_tokens, int num_channels,
                            int low_rank, int num_users, int num_gates, float eps,
                            float weight_offset) {
  NormArguments args{};
  args.normed = out<void>(normed);
  args.stride_normed = stride_normed;
  args.normed_aligned = stride_normed % 8 == 0;
  args.h = out<void>(h);
  args.x = in<void>(x);
  args.stride_x = stride_x;
  args.residual = in<void>(residual);
  args.stride_residual = stride_residual;
  args.weight = in<void>(std::get<0>(weight));
  args.weight_is_float = std::get<2>(weight);
  args.weight_aligned = std::get<3>(weight);
  args.film = in<void>(std::get<0>(film));
  args.stride_film = std::get<1>(film);
  args.film_is_float = std::get<2>(film);
  args.film_aligned = std::get<3>(film);
  args.lora_a = in<void>(lora_a);
  args.stride_a = stride_a;
  args.gates = in<void>(std::get<0>(gates));
  args.stride_gates = std::get<1>(gates);
  args.gates_is_float = std::get<2>(gates);
  args.slots = in<int32_t>(slots);
  args.num_tokens = num_tokens;
  args.num_channels = num_channels;
  args.low_rank = low_rank;
  args.num_users = num_users;
  args.num_gates = num_gates;
  args.eps = eps;
  args.weight_offset = weight_offset;
  args.plan = plan;
  launch_norm(args, static_cast<DType>(dtype), stream);
}

// (address, strides of page, position and head)
using Cache = std::tuple<Address, int64_t, int64_t, int64_t>;

void paged_attention(const AttentionPlan& plan, uintptr_t stream, int dtype, Address result,
                     Address partial, Address counters, Address q, int64_t stride_q,
                     int64_t stride_q_head, const Cache& k_cache, const Cache& v_cache,
                     Address block_tables, int64_t stride_table, Address kv_lens,
                     Address q_indptr, int num_tokens, int batch, int num_heads, int num_kv_heads,
                     int head_dim, int num_pages, int page_size, int max_keys, int window,
                     float log2_scale) {
  AttentionArguments args{};
  args.out = out<void>(result);
  args.partial = out<float>(partial);
  args.counters = out<int>(counters);
  args.q = in<void>(q);
  args.stride_q = stride_q;
  args.stride_q_head = stride_q_head;
  args.k_cache = in<void>(std::get<0>(k_cache));
  args.stride_k_page = std::get<1>(k_cache);
  args.stride_k = std::get<2>(k_cache);
  args.stride_k_head = std::get<3>(k_cache);
  args.v_cache = in<void>(std::get<0>(v_cache));
  args.stride_v_page = std::get<1>(v_cache);
  args.stride_v = std::get<2>(v_cache);
  args.stride_v_head = std::get<3>(v_cache);
  args.block_tables = in<int32_t>(block_tables);
  args.stride_table = stride_table;
  args.kv_lens = in<int32_t>(kv_lens);
  args.q_indptr = in<int32_t>(q_indptr);
  args.num_tokens = num_tokens;
  args.batch = batch;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.num_pages = num_pages;
  args.page_size = page_size;
  args.max_keys = max_keys;
  args.window = window;
  args.log2_scale = log2_scale;
  args.plan = plan;
  launch_attention(args, head_dim, static_cast<DType>(dtype), stream);
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream list(FSSA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

void bind_plans(py::module_& module) {
  py::class_<DeviceLimits>(module, "DeviceLimits")
      .def(py::init([](int capability, int num_sms, int shared_bytes) {
             return DeviceLimits{capability, num_sms, shared_bytes};
           }),
           py::arg("capability"), py::arg("num_sms"), py::arg("shared_bytes"));
  py::class_<LinearPlan>(module, "LinearPlan")
      .def_readonly("tiles", &LinearPlan::tiles)
      .def_readonly("in_loop", &LinearPlan::in_loop)
      .def_readonly("token_tiles", &LinearPlan::token_tiles)
      .def_readonly("block_columns", &LinearPlan::block_columns)
      .def_readonly("low_rows", &LinearPlan::low_rows)
      .def_readonly("num_tiles", &LinearPlan::num_tiles)
      .def_readonly("units_per_tile", &LinearPlan::units_per_tile)
      .def_readonly("grid", &LinearPlan::grid)
      .def_readonly("threads", &LinearPlan::threads)
      .def_readonly("stages", &LinearPlan::stages)
      .def_readonly("partial_floats", &LinearPlan::partial_floats)
      .def_property_readonly("shared_bytes",
                             [](const LinearPlan& plan) { return plan.shared.total; });
  py::class_<NormPlan>(module, "NormPlan")
      .def_readonly("blocks_t", &NormPlan::blocks_t)
      .def_readonly("blocks_w", &NormPlan::blocks_w)
      .def_readonly("threads", &NormPlan::threads)
      .def_readonly("shared_bytes", &NormPlan::shared_bytes);
  py::class_<AttentionPlan>(module, "AttentionPlan")
      .def_readonly("num_splits", &AttentionPlan::num_splits)
      .def_readonly("num_parts", &AttentionPlan::num_parts)
      .def_readonly("num_partials", &AttentionPlan::num_partials)
      .def_readonly("threads", &AttentionPlan::threads)
      .def_property_readonly("shared_bytes",
                             [](const AttentionPlan& plan) { return plan.shared.total; });
}

#if defined(FSSA_EMULATION)
// Index arithmetic and epilogues, for tests to look at one by one.
void bind_arithmetic(py::module_& module) {
  module.def("tile_offset", &tile_offset);
  module.def("row_of_lanes", &row_of_lanes);
  module.def("row_offset", &row_offset);
  module.def("rows_bytes", &rows_bytes);
  module.def("first_unit", &first_unit);
  module.def("owner_of", &owner_of);
  module.def("partial_slot", &partial_slot);
  module.def("place_of", [](int tile, const std::vector<int>& splits, int block_columns) {
    int ends[kMaxProjections] = {}, end = 0;
    for (size_t s = 0; s < splits.size(); ++s) ends[s] = end += splits[s];
    const TilePlace place = place_of(tile, ends, static_cast<int>(splits.size()), block_columns);
    return std::make_tuple(place.projection, place.first, place.columns);
  });
  module.def("silu_mul", &silu_mul);
  module.def("gelu_tanh_mul", &gelu_tanh_mul);
  module.def("round_to", [](float value, int dtype) {
    if (static_cast<DType>(dtype) == DType::kBFloat16) {
      BF16 rounded;
      from_float(value, rounded);
      return std::make_tuple(static_cast<int>(rounded.bits), to_float(rounded));
    }
    FP16 rounded;
    from_float(value, rounded);
    return std::make_tuple(static_cast<int>(rounded.bits), to_float(rounded));
  });
}
#endif

}  // namespace

PYBIND11_MODULE(FSSA_MODULE, module) {
  module.attr("architectures") = architectures();
  bind_plans(module);
  module.def("modulated_linear_plan", &modulated_linear_plan, py::kw_only(), py::arg("device"),
             py::arg("num_tokens"), py::arg("in_features"), py::arg("splits"), py::arg("paired"),
             py::arg("family"), py::arg("rank"));
  module.def("modulated_linear", &modulated_linear, py::kw_only(), py::arg("plan"),
             py::arg("stream"), py::arg("dtype"), py::arg("y"), py::arg("partial"),
             py::arg("counters"), py::arg("x"), py::arg("stride_x"), py::arg("weight"),
             py::arg("stride_w"), py::arg("bias"), py::arg("lora_a"), py::arg("stride_a"),
             py::arg("lora_b"), py::arg("rows"), py::arg("low"), py::arg("stride_low"),
             py::arg("slots"), py::arg("num_tokens"), py::arg("in_features"), py::arg("splits"),
             py::arg("rank"), py::arg("num_users"), py::arg("family"), py::arg("epilogue"));
  module.def("low_rank_input", &low_rank_input, py::kw_only(), py::arg("stream"),
             py::arg("dtype"), py::arg("low"), py::arg("stride_low"), py::arg("x"),
             py::arg("stride_x"), py::arg("lora_a"), py::arg("stride_a"),
             py::arg("stride_a_user"), py::arg("rows"), py::arg("slots"), py::arg("num_tokens"),
             py::arg("in_features"), py::arg("num_projections"), py::arg("rank"),
             py::arg("num_users"), py::arg("family"));
  module.def(
      "residual_film_rms_norm_plan",
      [](const DeviceLimits& device, int num_tokens, int num_channels, int low_rank) {
        return plan_norm(device, {num_tokens, num_channels, low_rank});
      },
      py::kw_only(), py::arg("device"), py::arg("num_tokens"), py::arg("num_channels"),
      py::arg("low_rank"));
  module.def("residual_film_rms_norm", &residual_film_rms_norm, py::kw_only(), py::arg("plan"),
             py::arg("stream"), py::arg("dtype"), py::arg("normed"), py::arg("stride_normed"),
             py::arg("h"), py::arg("x"), py::arg("stride_x"), py::arg("residual"),
             py::arg("stride_residual"), py::arg("weight"), py::arg("film"), py::arg("lora_a"),
             py::arg("stride_a"), py::arg("gates"), py::arg("slots"), py::arg("num_tokens"),
             py::arg("num_channels"), py::arg("low_rank"), py::arg("num_users"),
             py::arg("num_gates"), py::arg("eps"), py::arg("weight_offset"));
  module.def(
      "paged_attention_plan",
      [](const DeviceLimits& device, int num_tokens, int num_heads, int num_kv_heads, int head_dim,
         int max_keys) {
        return plan_attention(device, {num_tokens, num_heads, num_kv_heads, head_dim, max_keys});
      },
      py::kw_only(), py::arg("device"), py::arg("num_tokens"), py::arg("num_heads"),
      py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("max_keys"));
  module.def("paged_attention", &paged_attention, py::kw_only(), py::arg("plan"),
             py::arg("stream"), py::arg("dtype"), py::arg("result"), py::arg("partial"),
             py::arg("counters"), py::arg("q"), py::arg("stride_q"), py::arg("stride_q_head"),
             py::arg("k_cache"), py::arg("v_cache"), py::arg("block_tables"),
             py::arg("stride_table"), py::arg("kv_lens"), py::arg("q_indptr"),
             py::arg("num_tokens"), py::arg("batch"), py::arg("num_heads"),
             py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("num_pages"),
             py::arg("page_size"), py::arg("max_keys"), py::arg("window"), py::arg("log2_scale"));
#if defined(FSSA_EMULATION)
  bind_arithmetic(module);
  module.attr("emulated") = true;
  module.def("seed", [](uint64_t value) { emulation::machine().seed(value); });
#else
  module.attr("emulated") = false;
#endif
}
