// The end of a sentence encoder: add, LayerNorm, mean over the real tokens, L2 norm. One threadgroup a text, one simdgroup
// a token at a time: its norm needs no barrier, and padding is never read.
// x, r [texts, tokens, D]  w, b [D]  lengths [texts]  →  y [texts, D] float32
// template T, D, ITEMS = ceil(D / 32), EPS: the bits of eps, NORMALIZE
threadgroup float total[D];
threadgroup float scratch[32];
const uint text = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = threads / 32;
// No template: every width of a batch would be a kernel of its own, compiled when it first comes.
const uint tokens = uint(x_shape[1]);
const uint length = metal::min(uint(lengths[text]), tokens);
float pooled[ITEMS];
for (int k = 0; k < ITEMS; k++) pooled[k] = 0.0f;
for (uint token = simdgroup; token < length; token += simdgroups) {
  const size_t start = (size_t(text) * tokens + token) * D;
  float v[ITEMS];
  float sum = 0.0f;
  for (int k = 0; k < ITEMS; k++) {
    const uint i = lane + uint(k) * 32;
    v[k] = i < uint(D) ? float(T(float(x[start + i]) + float(r[start + i]))) : 0.0f;
    sum += v[k];
  }
  const float mean = metal::simd_sum(sum) / float(D);
  float deviation = 0.0f;
  for (int k = 0; k < ITEMS; k++) {
    if (lane + uint(k) * 32 < uint(D)) deviation += (v[k] - mean) * (v[k] - mean);
  }
  const float inverse = metal::rsqrt(metal::simd_sum(deviation) / float(D) + as_type<float>(uint(EPS)));
  for (int k = 0; k < ITEMS; k++) {
    const uint i = lane + uint(k) * 32;
    if (i < uint(D)) pooled[k] += float(T((v[k] - mean) * inverse * float(w[i]) + float(b[i])));
  }
}
// One simdgroup after the other, so that the sum has one order.
for (uint turn = 0; turn < simdgroups; turn++) {
  if (turn == simdgroup) {
    for (int k = 0; k < ITEMS; k++) {
      const uint i = lane + uint(k) * 32;
      if (i < uint(D)) total[i] = turn == 0 ? pooled[k] : total[i] + pooled[k];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
float squares = 0.0f;
for (uint i = thread_index; i < uint(D); i += threads) squares += total[i] * total[i];
const float norm = metal::sqrt(group_sum(squares, scratch, lane, simdgroup, simdgroups));
// The mean's division cancels in the norm, except for a vector of zeros.
const float factor = NORMALIZE ? 1.0f / metal::max(norm, 1e-12f * float(length)) : 1.0f / float(length);
for (uint i = thread_index; i < uint(D); i += threads) y[size_t(text) * D + i] = total[i] * factor;
