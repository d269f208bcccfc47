// What an adapter of low rank adds to outputs of a linear layer, for one row: gain · y + shift + (x A) B.
#ifndef inline_function
#define inline_function inline
#endif

// inner [RANK] = x A for the row x [IN] and A [IN, RANK], by the whole threadgroup: two barriers. A row of A is loaded PACK
// numbers at once, by COLUMNS threads: RANK / PACK rounded up to a power of two. `part`: threadgroup float[threads · PACK].
template <typename S, int IN, int RANK, int PACK, int COLUMNS, int STEPS, int DEPTH, int SIMDGROUPS, typename X, typename A, typename P, typename I>
inline_function void times_a(X x, A a, P part, I inner, uint thread_index, uint lane) {
  // Columns beyond the rank take its last ones, and nobody reads what they make.
  const size_t first = metal::min(thread_index % uint(COLUMNS), uint(RANK / PACK) - 1) * PACK;
  float sums[PACK];
  for (int p = 0; p < PACK; p++) sums[p] = 0.0f;
  for (int batch = 0; batch < STEPS; batch += DEPTH) {
    // Some rows a thread, so that the loads of all are under way together; beyond the last row it takes the last, times 0.
    float xs[DEPTH];
    uint4 words[DEPTH];
    float single[DEPTH];
    for (int n = 0; n < DEPTH; n++) {
      const uint i = thread_index / uint(COLUMNS) + uint(batch + n) * (uint(SIMDGROUPS) * 32 / uint(COLUMNS));
      const uint held = metal::min(i, uint(IN) - 1);
      xs[n] = i < uint(IN) ? float(x[held]) : 0.0f;
      if (PACK > 1) words[n] = DEVICE_POINTER(uint4, a + first + size_t(held) * RANK)[0];
      else single[n] = float(a[first + size_t(held) * RANK]);
    }
    for (int n = 0; n < DEPTH; n++) {
      for (int p = 0; p < PACK; p++) sums[p] += xs[n] * (PACK > 1 ? Packed<S>::at(words[n], p) : single[n]);
    }
  }
  for (int p = 0; p < PACK; p++) {
    for (uint step = 16; step > uint(COLUMNS) / 2; step >>= 1) sums[p] += metal::simd_shuffle_xor(sums[p], ushort(step));
    if (lane < uint(COLUMNS)) part[thread_index * PACK + p] = sums[p];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < uint(RANK)) {
    const uint c = thread_index / PACK;
    float whole = 0.0f;
    for (uint s = c / 32; s < uint(SIMDGROUPS); s += (uint(COLUMNS) + 31) / 32)
      whole += part[(s * 32 + c % 32) * PACK + thread_index % PACK];
    inner[thread_index] = whole;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The output o of OUT from `inner`; b [RANK, OUT], gain and shift [OUT] of the row's adapter.
template <int RANK, bool GAIN, bool SHIFT, typename B, typename G, typename H, typename I>
inline_function float adapted(float y, B b, G gain, H shift, I inner, uint outputs, uint o) {
  float update = 0.0f;
  for (int k = 0; k < RANK; k++) update += inner[k] * float(b[size_t(k) * outputs + o]);
  float result = GAIN ? y * float(gain[o]) : y;
  if (SHIFT) result += float(shift[o]);
  return result + update;
}
