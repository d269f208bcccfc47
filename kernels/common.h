// What several bodies share, in the subset that Metal and CUDA have in common.
#ifndef inline_function
#define inline_function inline
#endif

// The sum over the threadgroup, the same number in every thread. `scratch`: threadgroup float[32], used for nothing else,
// so that one barrier is enough.
template <typename P>
inline_function float group_sum(float value, P scratch, uint lane, uint simdgroup, uint simdgroups) {
  value = metal::simd_sum(value);
  if (lane == 0) scratch[simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return metal::simd_sum(lane < simdgroups ? scratch[lane] : 0.0f);
}
