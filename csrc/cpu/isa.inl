// Every kernel, compiled for the instruction set that FSSA_ISA names. The file that includes this
// has set the compiler's target by then, so no template of the standard library may be used from
// here on: the linker could keep that copy for files that run on lesser machines.
#include "math.inl"
#include "ahead.inl"
#include "exchange.inl"
#include "multiply.inl"
#ifdef FSSA_BF16_DOT
#include "compressed.inl"
#endif
#include "low_rank.inl"
#include "panel_reads.inl"
#include "modulated_linear.inl"
#include "take_rows.inl"
#include "residual_film_rms_norm.inl"
#include "rope_kv_write.inl"
#include "paged_attention.inl"
#include "sample.inl"
#include "limits.inl"

namespace FSSA_ISA {

void run_modulated_linear(const ModulatedLinearCall& call, Team& team) {
  call.dtype == DType::kFloat32 ? modulated_linear<float>(call, team)
                                : modulated_linear<BFloat16>(call, team);
}

void run_take_rows(const TakeRowsCall& call, Team& team) {
  call.dtype == DType::kFloat32 ? take_rows<float>(call, team) : take_rows<BFloat16>(call, team);
}

void run_norm(const NormCall& call, Team& team) {
  call.dtype == DType::kFloat32 ? norm<float>(call, team) : norm<BFloat16>(call, team);
}

void run_rope(const RopeCall& call, Team& team) {
  call.dtype == DType::kFloat32 ? rope<float>(call, team) : rope<BFloat16>(call, team);
}

void run_attention(const AttentionCall& call, Team& team) {
  call.dtype == DType::kFloat32 ? attention<float>(call, team) : attention<BFloat16>(call, team);
}

}  // namespace FSSA_ISA

#define FSSA_KERNELS(NAME)                                                                     \
  const Kernels& kernels_##NAME() {                                                            \
    static const Kernels set{#NAME,                                                            \
                             FSSA_ISA::kMaxRows,           FSSA_ISA::kReadsCompressed,         \
                             FSSA_ISA::run_modulated_linear,                                   \
                             FSSA_ISA::run_take_rows,      FSSA_ISA::run_norm,                 \
                             FSSA_ISA::run_rope,           FSSA_ISA::run_attention,            \
                             FSSA_ISA::chunk_stats,        FSSA_ISA::softmax_weights,          \
                             FSSA_ISA::stream,             FSSA_ISA::multiply_add};            \
    return set;                                                                                \
  }
