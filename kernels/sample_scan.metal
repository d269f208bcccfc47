// First of two launches of `sample`: one pass over the logits, a threadgroup for 4,096 of a row, a simdgroup for 512 of
// them (a chunk). Scores are logits after penalties and grammar, over the temperature.
// logits [rows, V]  temperature, top_k, top_p, greedy [rows]  seen_ids, seen, counts [rows, WIDTH]  last [rows]
// repetition, presence, frequency [rows]  allowed [rows, WORDS]
//   →  stats [rows, CHUNKS, 4]: of each chunk the logits' maximum and Σ exp(logit − it), and the same of the scores
//      histogram [rows, BLOCKS, 2, 256]: of the scores in bins of 1/8 below the block's maximum the count, and the mass
//      relative to the bin's upper edge in units of 2⁻¹⁸: integers, so that no order of additions shows
//      scores [rows, V] where ADJUSTED
// template T, V, CHUNKS, BLOCKS, ADJUSTED, WIDTH, PENALISED, MASKED, WORDS, TALLY = ADJUSTED ? 4096 : 1
threadgroup atomic_uint bins[512];
threadgroup atomic_uint tally[TALLY];
threadgroup float tops[8];
const uint row = threadgroup_position_in_grid.x;
const uint block = threadgroup_position_in_grid.y;
const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint chunk = block * 8 + simdgroup;
const uint first = chunk * 512 + lane;
const size_t start = size_t(row) * V;
for (uint i = thread_index; i < 512; i += 256) atomic_store_explicit(&bins[i], 0u, memory_order_relaxed);
if (PENALISED) {
  // How often each token of this block was seen: the count in the low bits, and that it was seen at all above them.
  for (uint i = thread_index; i < uint(TALLY); i += 256) atomic_store_explicit(&tally[i], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = thread_index; e < uint(WIDTH); e += 256) {
    const uint token = uint(seen_ids[size_t(row) * WIDTH + e]) - block * 4096;
    const uint entry = (1u << 22) + uint(counts[size_t(row) * WIDTH + e]);
    if (token < uint(TALLY) && float(seen[size_t(row) * WIDTH + e]) > 0.0f)
      atomic_fetch_add_explicit(&tally[token], entry, memory_order_relaxed);
  }
  if (thread_index == 0 && last[row] >= 0) {
    const uint token = uint(last[row]) - block * 4096;
    if (token < uint(TALLY)) atomic_fetch_add_explicit(&tally[token], (1u << 22) + 1u, memory_order_relaxed);
  }
}
float z[16];
float raw_top = -3e38f;
for (int k = 0; k < 16; k++) {
  const uint i = first + uint(k) * 32;
  z[k] = i < uint(V) ? float(logits[start + i]) : -INFINITY;
  raw_top = metal::max(raw_top, z[k]);
}
raw_top = metal::simd_max(raw_top);
float raw_sum = 0.0f;
for (int k = 0; k < 16; k++) raw_sum += metal::exp(z[k] - raw_top);
raw_sum = metal::simd_sum(raw_sum);
if (PENALISED) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int k = 0; k < 16; k++) {
    const uint n = atomic_load_explicit(&tally[simdgroup * 512 + lane + uint(k) * 32], memory_order_relaxed);
    if (n > 0) {
      const float count = float(n & ((1u << 22) - 1u));
      z[k] = z[k] < 0.0f ? z[k] * repetition[row] : z[k] / repetition[row];
      z[k] -= (count > 0.0f ? presence[row] : 0.0f) + frequency[row] * count;
    }
  }
}
float top = -SCORE_LIMIT;
for (int k = 0; k < 16; k++) {
  const uint i = first + uint(k) * 32;
  if (MASKED && i < uint(V) && ((uint(allowed[size_t(row) * WORDS + i / 32]) >> (i & 31)) & 1u) == 0) z[k] = -INFINITY;
  z[k] = scaled_score(z[k], temperature[row]);
  if (ADJUSTED && i < uint(V)) scores[start + i] = z[k];
  top = metal::max(top, z[k]);
}
top = metal::simd_max(top);
float sum = 0.0f;
for (int k = 0; k < 16; k++) sum += first + uint(k) * 32 < uint(V) ? metal::exp(z[k] - top) : 0.0f;
sum = metal::simd_sum(sum);
if (!ADJUSTED && row == 0 && block == 0 && thread_index == 0) scores[0] = 0.0f;  // nobody reads it
if (lane == 0) {
  tops[simdgroup] = top;
  if (chunk < uint(CHUNKS)) {
    const size_t at = (size_t(row) * CHUNKS + chunk) * 4;
    stats[at] = raw_top;
    stats[at + 1] = raw_sum;
    stats[at + 2] = top;
    stats[at + 3] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
// A top_k of 0 wraps round to the largest number: all are kept.
if (greedy[row] == 0 && (uint(top_k[row]) - 1u < uint(V) - 1u || top_p[row] < 1.0f)) {
  float block_top = tops[0];
  for (int s = 1; s < 8; s++) block_top = metal::max(block_top, tops[s]);
  const int best = score_bin(block_top);
  for (int k = 0; k < 16; k++) {
    const uint below = uint(best - score_bin(z[k]));
    if (first + uint(k) * 32 < uint(V) && below < 256) {
      const float mass = metal::exp((bin_fraction(z[k]) - 1.0f) * 0.125f);
      atomic_fetch_add_explicit(&bins[below], 1u, memory_order_relaxed);
      atomic_fetch_add_explicit(&bins[256 + below], uint(metal::rint(mass * 262144.0f)), memory_order_relaxed);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const size_t at = (size_t(row) * BLOCKS + block) * 512;
for (uint i = thread_index; i < 512; i += 256) histogram[at + i] = atomic_load_explicit(&bins[i], memory_order_relaxed);
