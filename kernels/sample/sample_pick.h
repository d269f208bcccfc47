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
    for (uint s = 0; s < 8; s++) {
      if (s < simdgroup) {
        count += count_part[s];
        mass += mass_part[s];
      }
    }
    count_to[thread_index] = count;
    mass_to[thread_index] = mass;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The first of 256 sums that reaches `wanted`, the last if none does: eight halvings for any numbers.
template <typename S, typename W>
inline_function uint first_reaching(S sums, W wanted) {
  uint low = 0;
  for (uint step = 128; step > 0; step >>= 1) low += sums[low + step - 1] >= wanted ? 0 : step;
  return low;
}
// The same among parts that hold a score, if any does. Masses are rounded, so that their sums may reach `wanted` at an
// empty part, too early or never; counts are exact: of the parts up to that one the last that holds a score is taken,
// else the first that does.
template <typename C, typename M>
inline_function uint part_reaching(C count_to, M mass_to, float wanted) {
  return first_reaching(count_to, metal::max(count_to[first_reaching(mass_to, wanted)], 1u));
}

// A number for each score that is smaller for a larger one: the bits of floats in order.
inline_function uint place_of(float score) {
  const uint bits = as_type<uint>(score);
  return bits >> 31 ? bits : 0x7fffffffu - bits;
}
// How many bits the numbers up to `most` take.
inline_function uint bits_of(uint most) {
  uint bits = 0;
  for (uint n = 0; n < 32; n++) bits = most >> n ? n + 1 : bits;
  return bits;
}
