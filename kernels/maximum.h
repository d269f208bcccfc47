// The maximum over a threadgroup, in the subset that Metal and CUDA have in common.
#ifndef inline_function
#define inline_function inline
#endif

// The maximum over the threadgroup, as group_sum.
template <typename P>
inline_function float group_max(float value, P scratch, uint lane, uint simdgroup, uint simdgroups) {
  value = metal::simd_max(value);
  if (lane == 0) scratch[simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return metal::simd_max(lane < simdgroups ? scratch[lane] : -3e38f);
}
