// The native module: plain functions on addresses, sizes, strides and codes. Python has checked
// shapes, dtypes and devices by the time these are called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>

#include "cpu/advance_step.h"
#include "cpu/compressed.h"
#include "cpu/graph.h"
#include "cpu/kernels.h"
#include "cpu/modulated_linear.h"
#include "cpu/paged_attention.h"
#include "cpu/residual_film_rms_norm.h"
#include "cpu/rope_kv_write.h"
#include "cpu/sample.h"

namespace py = pybind11;
using namespace fssa;
using namespace fssa::cpu;

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

DType dtype(int code) {
  if (code < 0 || code > 1) throw py::value_error("dtype: expected 0 (fp32) or 1 (bf16)");
  return static_cast<DType>(code);
}

// A number of rows, or (graph, dimension): whatever that dimension is at replay.
struct Rows {
  RowCount count;
};

// (address, dtype code, row stride, user stride, bytes of a compressed panel's header)
using Side = std::tuple<Address, int, int64_t, int64_t, int64_t>;

SideMatrix side(const Side& value) {
  const auto& [address, code, stride, user_stride, header_bytes] = value;
  return {in<void>(address), dtype(code), stride, user_stride, header_bytes};
}

// (address, token stride, head stride)
using HeadsTuple = std::tuple<Address, int64_t, int64_t>;

Heads heads(const HeadsTuple& value) {
  return {in<void>(std::get<0>(value)), std::get<1>(value), std::get<2>(value)};
}

std::shared_ptr<Call> modulated_linear(const Rows& rows_count, Address y, int64_t y_stride,
                                       int y_dtype, Address x, int64_t x_stride, int x_dtype,
                                       Address weight, int64_t header_bytes, Address bias,
                                       const Side& lora_a, const Side& lora_b, const Side& rows,
                                       Address slots, Address halves, int64_t num_halves,
                                       Address low_rank, Address partial, Address own,
                                       Address unmixed, Address widened, int64_t num_splits,
                                       int64_t in_features, int64_t rank, int64_t num_users,
                                       int family, int epilogue) {
  auto call = std::make_shared<ModulatedLinearCall>();
  call->count = rows_count.count;
  call->y = out<void>(y);
  call->y_stride = y_stride;
  call->y_dtype = dtype(y_dtype);
  call->x = in<void>(x);
  call->x_stride = x_stride;
  call->dtype = dtype(x_dtype);
  call->weight = in<void>(weight);
  call->header_bytes = header_bytes;
  call->bias = in<void>(bias);
  call->lora_a = side(lora_a);
  call->lora_b = side(lora_b);
  call->rows = side(rows);
  call->slots = in<int32_t>(slots);
  call->halves = in<Half>(halves);
  call->num_halves = num_halves;
  call->low_rank = out<float>(low_rank);
  call->partial = out<float>(partial);
  call->own = out<float>(own);
  call->unmixed = out<float>(unmixed);
  call->widened = out<float>(widened);
  call->num_splits = num_splits;
  call->in_features = in_features;
  call->rank = rank;
  call->num_users = num_users;
  call->family = static_cast<Family>(family);
  call->epilogue = static_cast<Epilogue>(epilogue);
  return call;
}

std::shared_ptr<Call> take_rows(const Rows& rows, Address y, int64_t y_stride, Address table,
                                int code, bool packed, int64_t header_bytes, int64_t row_stride,
                                int64_t k, int64_t num_rows, Address index, float scale) {
  auto call = std::make_shared<TakeRowsCall>();
  call->count = rows.count;
  call->y = out<void>(y);
  call->y_stride = y_stride;
  call->table = in<void>(table);
  call->dtype = dtype(code);
  call->packed = packed;
  call->header_bytes = header_bytes;
  call->row_stride = row_stride;
  call->k = k;
  call->num_rows = num_rows;
  call->index = in<int32_t>(index);
  call->scale = scale;
  return call;
}

std::shared_ptr<Call> residual_film_rms_norm(const Rows& rows, Address normed, Address h,
                                             int64_t out_stride, Address x, int64_t x_stride,
                                             Address residual, int64_t residual_stride, int code,
                                             Address weight, int weight_dtype, Address film,
                                             int film_dtype, int64_t film_stride, Address slots,
                                             int64_t num_users, int64_t channels, float eps,
                                             float weight_offset) {
  auto call = std::make_shared<NormCall>();
  call->count = rows.count;
  call->normed = out<void>(normed);
  call->h = out<void>(h);
  call->out_stride = out_stride;
  call->x = in<void>(x);
  call->x_stride = x_stride;
  call->residual = in<void>(residual);
  call->residual_stride = residual_stride;
  call->dtype = dtype(code);
  call->weight = in<void>(weight);
  call->weight_dtype = dtype(weight_dtype);
  call->film = in<void>(film);
  call->film_dtype = dtype(film_dtype);
  call->film_stride = film_stride;
  call->slots = in<int32_t>(slots);
  call->num_users = num_users;
  call->channels = channels;
  call->eps = eps;
  call->weight_offset = weight_offset;
  return call;
}

std::shared_ptr<Call> rope_kv_write(const Rows& rows, Address rotated, const HeadsTuple& q,
                                    const HeadsTuple& k, const HeadsTuple& v, Address k_cache,
                                    Address v_cache, int code, Address cos_sin, Address positions,
                                    Address kv_slots, int64_t num_heads, int64_t num_kv_heads,
                                    int64_t head_dim, int64_t rotary_dim, int64_t num_positions,
                                    int64_t num_kv_slots, Address q_norm, int q_norm_dtype,
                                    Address k_norm, int k_norm_dtype, float eps,
                                    float weight_offset) {
  auto call = std::make_shared<RopeCall>();
  call->count = rows.count;
  call->rotated = out<void>(rotated);
  call->q = heads(q);
  call->k = heads(k);
  call->v = heads(v);
  call->k_cache = out<void>(k_cache);
  call->v_cache = out<void>(v_cache);
  call->dtype = dtype(code);
  call->cos_sin = in<float>(cos_sin);
  call->positions = in<int32_t>(positions);
  call->kv_slots = in<int32_t>(kv_slots);
  call->num_heads = num_heads;
  call->num_kv_heads = num_kv_heads;
  call->head_dim = head_dim;
  call->rotary_dim = rotary_dim;
  call->num_positions = num_positions;
  call->num_kv_slots = num_kv_slots;
  call->q_norm = {in<void>(q_norm), dtype(q_norm_dtype)};
  call->k_norm = {in<void>(k_norm), dtype(k_norm_dtype)};
  call->eps = eps;
  call->weight_offset = weight_offset;
  return call;
}

std::shared_ptr<Call> paged_attention(const Rows& tokens, const Rows& sequences, Address result,
                                      int64_t result_stride, const HeadsTuple& q,
                                      Address k_cache, Address v_cache, int code,
                                      Address block_tables, int64_t block_stride, Address kv_lens,
                                      Address q_indptr, int64_t num_pages, int64_t page_size,
                                      int64_t max_pages, int64_t num_heads, int64_t num_kv_heads,
                                      int64_t head_dim, float scale, int64_t window,
                                      Address scratch, int64_t num_threads) {
  auto call = std::make_shared<AttentionCall>();
  call->num_tokens = tokens.count;
  call->num_sequences = sequences.count;
  call->out = out<void>(result);
  call->out_stride = result_stride;
  call->q = in<void>(std::get<0>(q));
  call->q_token_stride = std::get<1>(q);
  call->q_head_stride = std::get<2>(q);
  call->k_cache = in<void>(k_cache);
  call->v_cache = in<void>(v_cache);
  call->dtype = dtype(code);
  call->block_tables = in<int32_t>(block_tables);
  call->block_stride = block_stride;
  call->kv_lens = in<int32_t>(kv_lens);
  call->q_indptr = in<int32_t>(q_indptr);
  call->num_pages = num_pages;
  call->page_size = page_size;
  call->max_pages = max_pages;
  call->num_heads = num_heads;
  call->num_kv_heads = num_kv_heads;
  call->head_dim = head_dim;
  call->scale = scale;
  call->window = window;
  call->scratch = out<float>(scratch);
  call->done = std::make_unique<std::atomic<int64_t>[]>(num_threads);
  return call;
}

std::shared_ptr<Call> sample(const Rows& rows, Address tokens, Address logprobs, Address logits,
                             int64_t stride, int code, int64_t vocab_size, Address temperature,
                             Address top_k, Address top_p, Address min_p, Address uniform,
                             Address forced, Address stats, Address weights, Address kept) {
  auto call = std::make_shared<SampleCall>();
  call->count = rows.count;
  call->tokens = out<int32_t>(tokens);
  call->logprobs = out<float>(logprobs);
  call->logits = in<void>(logits);
  call->stride = stride;
  call->dtype = dtype(code);
  call->vocab_size = vocab_size;
  call->temperature = in<float>(temperature);
  call->top_k = in<int32_t>(top_k);
  call->top_p = in<float>(top_p);
  call->min_p = in<float>(min_p);
  call->uniform = in<float>(uniform);
  call->forced = in<int32_t>(forced);
  call->stats = out<ChunkStats>(stats);
  call->weights = out<float>(weights);
  call->kept = out<int32_t>(kept);
  return call;
}

// (address, row stride, columns)
using PerRowTuple = std::tuple<Address, int64_t, int64_t>;

template <typename T>
PerRow<T> per_row(const PerRowTuple& value) {
  const auto& [address, stride, width] = value;
  return {out<T>(address), stride, width};
}

std::shared_ptr<Call> advance_step(const Rows& rows, Address chosen, Address logprobs,
                                   Address tokens, Address positions, Address kv_slots,
                                   Address kv_lens, const PerRowTuple& block_tables,
                                   Address uniform, const PerRowTuple& draws,
                                   const PerRowTuple& stop_tokens, Address num_done,
                                   const PerRowTuple& log_tokens, const PerRowTuple& log_logprobs,
                                   Address ended, int64_t page_size) {
  auto call = std::make_shared<AdvanceCall>();
  call->count = rows.count;
  call->chosen = in<int32_t>(chosen);
  call->logprobs = in<float>(logprobs);
  call->tokens = out<int32_t>(tokens);
  call->positions = out<int32_t>(positions);
  call->kv_slots = out<int32_t>(kv_slots);
  call->kv_lens = out<int32_t>(kv_lens);
  call->block_tables = per_row<const int32_t>(block_tables);
  call->uniform = out<float>(uniform);
  call->draws = per_row<const float>(draws);
  call->stop_tokens = per_row<const int32_t>(stop_tokens);
  call->num_done = out<int32_t>(num_done);
  call->log_tokens = per_row<int32_t>(log_tokens);
  call->log_logprobs = per_row<float>(log_logprobs);
  call->ended = out<int32_t>(ended);
  call->page_size = page_size;
  return call;
}

// Whether a signal has come whose handler raised; the exception is set then.
bool signal_raised() {
  py::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

// run(poll) without the GIL. Python's main thread is the only one that handles signals: `is_main`.
template <typename Run>
void run_until_signal(bool is_main, const Run& run) {
  {
    py::gil_scoped_release released;
    run(is_main ? Graph::Poll(&signal_raised) : Graph::Poll());
  }
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
}

double stream_seconds(Address data, int64_t bytes, int num_threads) {
  double sums[2] = {0.0, 0.0};
  const auto start = std::chrono::steady_clock::now();
  run_team(num_threads, [&](Team& team) {
    const double total = kernels().stream(in<void>(data), bytes, team);
    if (team.index() == 0) sums[0] = total;
  });
  const auto stop = std::chrono::steady_clock::now();
  volatile double used = sums[0];
  (void)used;
  return std::chrono::duration<double>(stop - start).count();
}

double barrier_seconds(int64_t count, int num_threads) {
  const auto start = std::chrono::steady_clock::now();
  run_team(num_threads, [&](Team& team) {
    for (int64_t i = 0; i < count; ++i) team.barrier();
  });
  const auto stop = std::chrono::steady_clock::now();
  return std::chrono::duration<double>(stop - start).count() / static_cast<double>(count);
}

double multiply_add_rate(int64_t steps, int num_threads) {
  std::atomic<int64_t> flop{0};
  std::atomic<double> used{0.0};
  float values[kMultiplyAddStart];
  for (int i = 0; i < kMultiplyAddStart; ++i) values[i] = static_cast<float>(i);
  const auto start = std::chrono::steady_clock::now();
  run_team(num_threads, [&](Team&) {
    int64_t own = 0;
    used = kernels().multiply_add(steps, values, own);
    flop += own;
  });
  const auto stop = std::chrono::steady_clock::now();
  return static_cast<double>(flop) / std::chrono::duration<double>(stop - start).count();
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Native kernels of fssa_kernels; call them through fssa_kernels only.";

  m.def("instruction_set", [] { return std::string(kernels().name); },
        "The instruction set in use.");
  m.def("instruction_sets", &instruction_sets, "Those this build and this machine have, best first.");
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"));
  m.def("stream_seconds", &stream_seconds, NoGil(), py::arg("data"), py::arg("bytes"),
        py::arg("num_threads"), "Time to read that memory once.");
  m.def("barrier_seconds", &barrier_seconds, NoGil(), py::arg("count"), py::arg("num_threads"),
        "Time that a barrier takes where all arrive at once.");
  m.def("multiply_add_rate", &multiply_add_rate, NoGil(), py::arg("steps"), py::arg("num_threads"),
        "Floating-point operations a second, all in registers.");
  m.def("half_bytes", [](int code, int64_t k) { return half_bytes(dtype(code), k); });
  m.def("attention_scratch", &AttentionCall::thread_scratch, py::arg("num_heads"),
        py::arg("head_dim"), py::arg("max_keys"));
  m.attr("MAX_NORMED_HEAD") = kMaxNormedHead;
  m.attr("HALF_COLUMNS") = kHalfColumns;
  m.attr("MOST_ROWS") = kMostRows;
  m.def("shrink_parts", &shrink_parts);
  m.attr("SAMPLE_CHUNK") = kSampleChunk;
  m.def(
      "pack_matrix",
      [](Address to, Address matrix, int64_t stride, int code, int64_t k, Address halves,
         int64_t num_halves, int64_t panel_halves, int num_threads) {
        pack_matrix(out<void>(to), in<void>(matrix), stride,
                    {dtype(code), k, in<Half>(halves), num_halves, panel_halves}, num_threads);
      },
      NoGil());
  m.def(
      "unpack_matrix",
      [](Address to, Address packed, int64_t stride, int code, int64_t k, Address halves,
         int64_t num_halves, int64_t panel_halves, int num_threads) {
        unpack_matrix(out<void>(to), in<void>(packed), stride,
                      {dtype(code), k, in<Half>(halves), num_halves, panel_halves}, num_threads);
      },
      NoGil());

  m.def("reads_compressed", [] { return kernels().reads_compressed; },
        "Whether products of the instruction set in use read compressed weights.");
  m.def("compressed_panel_bytes", &compressed_panel_bytes);
  m.def(
      "compressed_header_bytes",
      [](Address packed, int64_t num_panels, int64_t num_words, int num_threads) {
        return compressed_header_bytes(in<void>(packed), num_panels, num_words, num_threads);
      },
      NoGil());
  m.def(
      "compress_panels",
      [](Address to, Address packed, int64_t num_panels, int64_t num_words, int64_t header_bytes,
         int num_threads) {
        compress_panels(out<void>(to), in<void>(packed), num_panels, num_words, header_bytes,
                        num_threads);
      },
      NoGil());
  m.def(
      "decompress_panels",
      [](Address to, Address compressed, int64_t num_panels, int64_t num_words,
         int64_t header_bytes, int num_threads) {
        decompress_panels(out<void>(to), in<void>(compressed), num_panels, num_words, header_bytes,
                          num_threads);
      },
      NoGil());

  py::class_<Rows>(m, "Rows")
      .def(py::init([](int64_t count) { return Rows{{count, nullptr}}; }))
      .def(py::init([](const Graph& graph, int64_t dim) { return Rows{{0, graph.dim(dim)}}; }));

  py::class_<Call, std::shared_ptr<Call>>(m, "Call")
      .def("run", [](const Call& call, int num_threads) { run_alone(call, num_threads); }, NoGil(),
           py::arg("num_threads"));

  py::class_<Graph>(m, "Graph")
      .def(py::init<int64_t>(), py::arg("num_dims"))
      .def("add", [](Graph& graph, std::shared_ptr<Call> call) { graph.add(call); })
      .def(
          "replay",
          [](Graph& graph, const std::vector<int64_t>& dims, int num_threads, bool is_main) {
            run_until_signal(is_main, [&](const Graph::Poll& poll) {
              graph.replay(dims, num_threads, poll);
            });
          },
          py::arg("dims"), py::arg("num_threads"), py::arg("is_main"))
      .def(
          "end_step",
          [](Graph& graph, Address ended, int64_t dim, Address interrupt) {
            graph.end_step(in<int32_t>(ended), dim, in<int32_t>(interrupt));
          },
          py::arg("ended"), py::arg("dim"), py::arg("interrupt"))
      .def(
          "repeat",
          [](Graph& graph, const std::vector<int64_t>& dims, int num_threads, int64_t times,
             double seconds, bool is_main) {
            int64_t done = 0;
            run_until_signal(is_main, [&](const Graph::Poll& poll) {
              done = graph.repeat(dims, num_threads, times, seconds, poll);
            });
            return done;
          },
          py::arg("dims"), py::arg("num_threads"), py::arg("times"), py::arg("seconds"),
          py::arg("is_main"))
      .def(
          "profile",
          [](Graph& graph, const std::vector<int64_t>& dims, int num_threads, int repeats,
             bool is_main) {
            std::vector<double> seconds;
            run_until_signal(is_main, [&](const Graph::Poll& poll) {
              seconds = graph.profile(dims, num_threads, repeats, poll);
            });
            return seconds;
          },
          py::arg("dims"), py::arg("num_threads"), py::arg("repeats"), py::arg("is_main"))
      .def("__len__", &Graph::size);

  m.def("modulated_linear", &modulated_linear);
  m.def("take_rows", &take_rows);
  m.def("residual_film_rms_norm", &residual_film_rms_norm);
  m.def("rope_kv_write", &rope_kv_write);
  m.def("paged_attention", &paged_attention);
  m.def("sample", &sample);
  m.def("advance_step", &advance_step);
}
