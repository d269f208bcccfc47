// Queries and keys of one new token a row, from the projections to what attention and the cache take: an RMSNorm over each
// head where the model has one, then the rotation by the row's own position. A simdgroup a head.
// q [rows, HEADS · DIM]  k [rows, KV_HEADS · DIM]  offset [rows]  period [DIM / 2] float32  q_weight, k_weight [DIM]
//   →  queries [rows, HEADS · DIM]  keys [rows, KV_HEADS · DIM]
// template T, HEADS, KV_HEADS, DIM, ITEMS = ceil(DIM / 64), NORM, EPS: the bits of eps
const uint row = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
const uint head = threadgroup_position_in_grid.y * (threads_per_threadgroup.x / 32) + simdgroup_index_in_threadgroup;
if (head >= uint(HEADS + KV_HEADS)) return;  // a whole simdgroup
const bool is_query = head < uint(HEADS);
const size_t start = is_query ? (size_t(row) * HEADS + head) * DIM : (size_t(row) * KV_HEADS + head - HEADS) * DIM;
float low[ITEMS];
float high[ITEMS];
float squares = 0.0f;
for (int n = 0; n < ITEMS; n++) {
  const uint i = lane + uint(n) * 32;
  low[n] = 0.0f;
  high[n] = 0.0f;
  if (i < uint(DIM / 2)) {
    low[n] = is_query ? float(q[start + i]) : float(k[start + i]);
    high[n] = is_query ? float(q[start + i + DIM / 2]) : float(k[start + i + DIM / 2]);
  }
  squares += low[n] * low[n] + high[n] * high[n];
}
if (NORM) {
  const float inverse = metal::rsqrt(metal::simd_sum(squares) / float(DIM) + as_type<float>(uint(EPS)));
  for (int n = 0; n < ITEMS; n++) {
    const uint i = lane + uint(n) * 32;
    if (i < uint(DIM / 2)) {
      const float low_weight = is_query ? float(q_weight[i]) : float(k_weight[i]);
      const float high_weight = is_query ? float(q_weight[i + DIM / 2]) : float(k_weight[i + DIM / 2]);
      low[n] = float(T(low[n] * inverse * low_weight));
      high[n] = float(T(high[n] * inverse * high_weight));
    }
  }
}
for (int n = 0; n < ITEMS; n++) {
  const uint i = lane + uint(n) * 32;
  if (i < uint(DIM / 2)) {
    const float angle = float(offset[row]) / period[i];
    const float c = metal::cos(angle);
    const float s = metal::sin(angle);
    const T first = T(low[n] * c - high[n] * s);
    const T second = T(low[n] * s + high[n] * c);
    if (is_query) {
      queries[start + i] = first;
      queries[start + i + DIM / 2] = second;
    } else {
      keys[start + i] = first;
      keys[start + i + DIM / 2] = second;
    }
  }
}
