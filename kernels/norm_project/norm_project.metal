// h = x + r as it is stored, u = h / sqrt(mean(h²) + eps) · w, and of u a product: y = u M + bias, or where GATED
// y = silu(u G) · (u U). What `add_rms_norm`, a product and, gated, one more would do in two or three launches: each
// threadgroup norms the rows for itself, which costs less than a launch.
// x, r [ROWS, D]  w [D]  m [OUT, D]: the columns of M, or [2·OUT, D]: those of G, then those of U  bias [OUT] where BIAS
//   →  h [ROWS, D]  y [ROWS, OUT]
// template T, D, OUT, ROWS, GATED, BIAS, COLUMNS: of the matrix for a simdgroup, PACK: numbers of 16 bytes,
// STEPS = ceil(D / (32·PACK)), EPS: the bits of eps
threadgroup float scratch[32 * ROWS];
threadgroup float normed[ROWS * STEPS * PACK * 32];
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
// A lane reads what lies a step apart: neighbours in a step are in neighbouring banks.
for (int row = 0; row < ROWS; row++) {
  float squares = 0.0f;
  for (uint i = thread_index; i < uint(D); i += threads) {
    const uint at = uint(row) * D + i;
    const T sum = T(float(x[at]) + float(r[at]));
    if (group == 0) h[at] = sum;
    normed[(uint(row) * STEPS * PACK + i / (32 * PACK) * PACK + i % PACK) * 32 + i / PACK % 32] = float(sum);
    squares += float(sum) * float(sum);
  }
  const float total = group_sum(squares, scratch + 32 * row, lane, simdgroup, threads / 32);
  const float inverse = metal::rsqrt(total / float(D) + as_type<float>(uint(EPS)));
  for (uint i = thread_index; i < uint(D); i += threads) {
    const uint held = (uint(row) * STEPS * PACK + i / (32 * PACK) * PACK + i % PACK) * 32 + i / PACK % 32;
    normed[held] = float(T(normed[held] * inverse * float(w[i])));
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
// Gated, a column of G and that of U take turns.
const int SIDES = GATED ? 2 : 1;
const uint first = (group * (threads / 32) + simdgroup) * (COLUMNS / SIDES);
float sums[COLUMNS * ROWS];
for (int k = 0; k < COLUMNS * ROWS; k++) sums[k] = 0.0f;
for (int step = 0; step < STEPS; step++) {
  const uint i = (uint(step) * 32 + lane) * PACK;
  if (i < uint(D)) {
    uint4 words[COLUMNS];
    for (int k = 0; k < COLUMNS; k++) {
      const uint column = metal::min(first + uint(k) / SIDES, uint(OUT) - 1) + uint(k % SIDES) * OUT;
      words[k] = DEVICE_POINTER(uint4, m + size_t(column) * D + i)[0];
    }
    for (int p = 0; p < PACK; p++) {
      for (int row = 0; row < ROWS; row++) {
        const float u = normed[((uint(row) * STEPS + uint(step)) * PACK + uint(p)) * 32 + lane];
        for (int k = 0; k < COLUMNS; k++) sums[k * ROWS + row] += u * Packed<T>::at(words[k], p);
      }
    }
  }
}
for (int k = 0; k < COLUMNS; k += SIDES) {
  const uint o = first + uint(k) / SIDES;
  for (int row = 0; row < ROWS; row++) {
    float made = metal::simd_sum(sums[k * ROWS + row]);
    if (BIAS) made += float(bias[metal::min(o, uint(OUT) - 1)]);
    if (GATED) {
      const float gate = float(T(made));
      made = gate / (1.0f + metal::exp(-gate)) * float(T(metal::simd_sum(sums[(k + SIDES - 1) * ROWS + row])));
    }
    if (lane == 0 && o < uint(OUT)) y[size_t(row) * OUT + o] = T(made);
  }
}
