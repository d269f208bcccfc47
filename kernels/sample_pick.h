// The maximum over the threadgroup, as group_sum.
template <typename P>
inline_function float group_max(float value, P scratch, uint lane, uint simdgroup, uint simdgroups) {
  value = metal::simd_max(value);
  if (lane == 0) scratch[simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return metal::simd_max(lane < simdgroups ? scratch[lane] : -3e38f);
}

// Sums over 256 bins from the first on, of what the first 256 threads have; every thread calls it.
template <typename C, typename M, typename CP, typename MP>
inline_function void sums_to(uint count, float mass, C count_to, M mass_to, CP count_part, MP mass_part, uint thread_index,
                             uint lane, uint simdgroup) {
  count = metal::simd_prefix_inclusive_sum(count);
  mass = metal::simd_prefix_inclusive_sum(mass);
  if (lane == 31 && simdgroup < 8) {
    count_part[simdgroup] = count;
    mass_part[simdgroup] = mass;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup < 8) {
    for (uint s = 0; s < simdgroup; s++) {
      count += count_part[s];
      mass += mass_part[s];
    }
    count_to[thread_index] = count;
    mass_to[thread_index] = mass;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The first bin at which the sum reaches `wanted`; 256 if none does.
template <typename C>
inline_function uint first_count(C count_to, uint wanted) {
  uint low = 0, high = 256;
  while (low < high) {
    const uint middle = (low + high) / 2;
    if (count_to[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}
template <typename M>
inline_function uint first_mass(M mass_to, float wanted) {
  uint low = 0, high = 256;
  while (low < high) {
    const uint middle = (low + high) / 2;
    if (mass_to[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}
