// Every operator of csrc/cpu, one line each; files of csrc/cuda register theirs. Schemas and fakes stand in
// memkernels/ops/<op>/op.py, where Triton finds them too.
#include "common/kernel_table.h"

#define MEMKERNELS_IMPL(name) m.impl(#name, &memkernels::KernelTable<#name>::call)

STABLE_TORCH_LIBRARY_IMPL(memkernels, CPU, m) {
  MEMKERNELS_IMPL(adafactor_);
  MEMKERNELS_IMPL(adamw_);
  MEMKERNELS_IMPL(attention_bwd);
  MEMKERNELS_IMPL(attention_fwd);
  MEMKERNELS_IMPL(cross_entropy_grad_);
  MEMKERNELS_IMPL(cross_entropy_stats);
  MEMKERNELS_IMPL(expert_activation_bwd);
  MEMKERNELS_IMPL(expert_activation_bwd_);
  MEMKERNELS_IMPL(expert_activation_fwd);
  MEMKERNELS_IMPL(factored_square_sum);
  MEMKERNELS_IMPL(factored_squares);
  MEMKERNELS_IMPL(fp8_decode_);
  MEMKERNELS_IMPL(fp8_encode_);
  MEMKERNELS_IMPL(gated_activation_bwd);
  MEMKERNELS_IMPL(gated_activation_bwd_);
  MEMKERNELS_IMPL(gated_activation_fwd);
  MEMKERNELS_IMPL(layer_norm_bwd);
  MEMKERNELS_IMPL(layer_norm_fwd);
  MEMKERNELS_IMPL(lion_);
  MEMKERNELS_IMPL(matmul_into_);
  MEMKERNELS_IMPL(moe_combine);
  MEMKERNELS_IMPL(moe_combine_bwd);
  MEMKERNELS_IMPL(moe_dispatch);
  MEMKERNELS_IMPL(moe_plan);
  MEMKERNELS_IMPL(nf4_dequantize_);
  MEMKERNELS_IMPL(nf4_quantize);
  MEMKERNELS_IMPL(nf4_quantize_absmax);
  MEMKERNELS_IMPL(on_huge_pages_);
  MEMKERNELS_IMPL(rms_norm_bwd);
  MEMKERNELS_IMPL(rms_norm_fwd);
  MEMKERNELS_IMPL(rotary_bwd);
  MEMKERNELS_IMPL(rotary_fwd);
  MEMKERNELS_IMPL(row_dropout);
  MEMKERNELS_IMPL(row_dropout_add_);
  MEMKERNELS_IMPL(row_noise);
  MEMKERNELS_IMPL(sgd_);
  MEMKERNELS_IMPL(square_sum);
}
