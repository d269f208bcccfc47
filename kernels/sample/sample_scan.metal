// First of two launches of `sample`: one pass over the logits, a threadgroup for 4,096 of a row, a simdgroup for 512 of
// them (a chunk). Scores are logits after penalties and grammar, over the temperature.
// logits [rows, V]  temperature, top_k, top_p, greedy [rows]  seen_ids, seen, counts [rows, WIDTH]  last [rows]
// repetition, presence, frequency [rows]  allowed [rows, WORDS]
//   →  stats [rows, CHUNKS, 4]: of each chunk the logits' maximum and Σ exp(logit − it), and the same of the scores
//      histogram [rows, BLOCKS, 2, 256]: of the scores in bins of 1/8 below the block's maximum the count, and what their
//      weights relative to the bin's upper edge lack of 1 (`deficit`): integers, so that no order of additions shows
//      scores [rows, V] where ADJUSTED
// template T, V, CHUNKS, BLOCKS, ADJUSTED, WIDTH, PENALISED, MASKED, WORDS, TALLY = PENALISED ? 4096 : 1
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
const float t = usable(temperature[row]);
for (uint i = thread_index; i < 512; i += 256) atomic_store_explicit(&bins[i], 0u, memory_order_relaxed);
if (PENALISED) {
  // How often each token of this block was seen, and in the highest bit that it was seen at all.
  for (uint i = thread_index; i < uint(TALLY); i += 256) atomic_store_explicit(&tally[i], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = thread_index; e < uint(WIDTH); e += 256) {
    const uint token = uint(seen_ids[size_t(row) * WIDTH + e]) - block * 4096;
    if (token < uint(TALLY) && float(seen[size_t(row) * WIDTH + e]) > 0.0f) {
      const float count = float(counts[size_t(row) * WIDTH + e]);
      atomic_fetch_add_explicit(&tally[token], count > 0.0f ? uint(metal::min(count, 1048576.0f)) : 0u, memory_order_relaxed);
      atomic_fetch_or_explicit(&tally[token], 1u << 31, memory_order_relaxed);
    }
  }
  if (thread_index == 0 && last[row] >= 0) {
    const uint token = uint(last[row]) - block * 4096;
    if (token < uint(TALLY)) {
      atomic_fetch_add_explicit(&tally[token], 1u, memory_order_relaxed);
      atomic_fetch_or_explicit(&tally[token], 1u << 31, memory_order_relaxed);
    }
  }
}
float z[16];
float raw_top = -3e38f;
for (int k = 0; k < 16; k++) {
  const uint i = first + uint(k) * 32;
  z[k] = i < uint(V) ? float(logits[start + i]) : -INFINITY;
  raw_top = metal::max(raw_top, finite_logit(z[k]));
}
raw_top = metal::simd_max(raw_top);
float raw_sum = 0.0f;
for (int k = 0; k < 16; k++) raw_sum += first + uint(k) * 32 < uint(V) ? metal::exp(finite_logit(z[k]) - raw_top) : 0.0f;
raw_sum = metal::simd_sum(raw_sum);
if (PENALISED) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int k = 0; k < 16; k++) {
    const uint n = atomic_load_explicit(&tally[simdgroup * 512 + lane + uint(k) * 32], memory_order_relaxed);
    if (n > 0) {
      const float count = float(n & 0x7fffffffu);
      z[k] = z[k] < 0.0f ? z[k] * repetition[row] : z[k] / repetition[row];
      if (count > 0.0f) z[k] -= presence[row] + frequency[row] * count;
    }
  }
}
float top = -SCORE_LIMIT;
for (int k = 0; k < 16; k++) {
  const uint i = first + uint(k) * 32;
  if (MASKED && i < uint(V) && ((uint(allowed[size_t(row) * WORDS + i / 32]) >> (i & 31)) & 1u) == 0) z[k] = -INFINITY;
  z[k] = scaled_score(z[k], t);
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
const bool is_greedy = greedy[row] != 0 || !is_temperature(temperature[row]);
if (!is_greedy && ((top_k[row] > 0 && top_k[row] < V) || top_p[row] < 1.0f)) {
  const float units = DEFICIT_UNITS;
  float best = tops[0];
  for (int n = 1; n < 8; n++) best = metal::max(best, tops[n]);
  for (int k = 0; k < 16; k++) {
    const uint below = bins_below(best, z[k]);
    if (first + uint(k) * 32 < uint(V) && below < 256) {
      atomic_fetch_add_explicit(&bins[below], 1u, memory_order_relaxed);
      atomic_fetch_add_explicit(&bins[256 + below], deficit(z[k], units), memory_order_relaxed);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const size_t at = (size_t(row) * BLOCKS + block) * 512;
for (uint i = thread_index; i < 512; i += 256) histogram[at + i] = atomic_load_explicit(&bins[i], memory_order_relaxed);
