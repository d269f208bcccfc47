// Attention of one new token a row over keys and values where they lie: a row reads its own columns and no more, without
// mask and without padding. One threadgroup for the heads of a row that share keys and values; a simdgroup has one head
// and every SPLITSth batch of keys. LANES lanes have a key, each PACK of its numbers, loaded at once.
// q [rows, HEADS · DIM]  keys, values [slots, KV_HEADS, capacity, DIM]  offset [rows]  →  y [rows, HEADS · DIM]
// template T, DIM, GROUP = HEADS / KV_HEADS, KV_HEADS, SPLITS, DEPTH, PACK = 16 bytes / T, WINDOW (0: none), SCALE: its bits
constexpr int LANES = DIM / PACK;
constexpr int KEYS = 32 / LANES;
threadgroup float part[GROUP * SPLITS][DIM];
threadgroup float part_top[GROUP * SPLITS];
threadgroup float part_sum[GROUP * SPLITS];
const uint row = threadgroup_position_in_grid.x;
const uint kv_head = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint head = simdgroup % uint(GROUP);
const uint split = simdgroup / uint(GROUP);
const uint piece = lane % uint(LANES);
const uint capacity = uint(keys_shape[2]);
const uint end = metal::min(uint(offset[row]) + 1, capacity);
const uint begin = WINDOW > 0 && end > uint(WINDOW) ? end - uint(WINDOW) : 0u;
const size_t q_start = ((size_t(row) * KV_HEADS + kv_head) * GROUP + head) * DIM;
const size_t kv_start = (size_t(row) * KV_HEADS + kv_head) * capacity * DIM;
float query[PACK];
float sum_v[PACK];
for (int d = 0; d < PACK; d++) {
  query[d] = float(q[q_start + piece * PACK + d]) * as_type<float>(uint(SCALE));
  sum_v[d] = 0.0f;
}
float top = -3e38f;
float sum = 0.0f;
for (uint batch = begin + split * KEYS * DEPTH; batch < end; batch += SPLITS * KEYS * DEPTH) {
  // Some keys a lane, so that the loads of all are under way together.
  uint4 k[DEPTH];
  uint4 v[DEPTH];
  float score[DEPTH];
  float new_top = top;
  for (int n = 0; n < DEPTH; n++) {
    const uint i = metal::min(batch + uint(n) * KEYS + lane / LANES, end - 1);
    k[n] = DEVICE_POINTER(uint4, keys + kv_start + size_t(i) * DIM)[piece];
    v[n] = DEVICE_POINTER(uint4, values + kv_start + size_t(i) * DIM)[piece];
  }
  for (int n = 0; n < DEPTH; n++) {
    float dot = 0.0f;
    for (int d = 0; d < PACK; d++) dot += query[d] * Packed<T>::at(k[n], d);
    for (uint step = LANES / 2; step > 0; step >>= 1) dot += metal::simd_shuffle_xor(dot, ushort(step));
    score[n] = batch + uint(n) * KEYS + lane / LANES < end ? dot : -3e38f;
    new_top = metal::max(new_top, score[n]);
  }
  // The softmax as it goes (Milakov and Gimelshein, 2018).
  const float fade = metal::exp(top - new_top);
  sum *= fade;
  for (int d = 0; d < PACK; d++) sum_v[d] *= fade;
  for (int n = 0; n < DEPTH; n++) {
    const float weight = score[n] > -3e38f ? metal::exp(score[n] - new_top) : 0.0f;
    sum += weight;
    for (int d = 0; d < PACK; d++) sum_v[d] += weight * Packed<T>::at(v[n], d);
  }
  top = new_top;
}
// The lanes that had other keys, then the simdgroups that had.
const float head_top = metal::simd_max(top);
const float share = metal::exp(top - head_top);
sum = metal::simd_sum(piece == 0 ? sum * share : 0.0f);
for (int d = 0; d < PACK; d++) {
  sum_v[d] *= share;
  for (uint step = 16; step > LANES / 2; step >>= 1) sum_v[d] += metal::simd_shuffle_xor(sum_v[d], ushort(step));
  if (lane < uint(LANES)) part[simdgroup][piece * PACK + d] = sum_v[d];
}
if (lane == 0) {
  part_top[simdgroup] = head_top;
  part_sum[simdgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (split > 0) return;
float all_top = -3e38f;
for (int s = 0; s < SPLITS; s++) all_top = metal::max(all_top, part_top[head + s * GROUP]);
float total = 0.0f;
for (int s = 0; s < SPLITS; s++) total += part_sum[head + s * GROUP] * metal::exp(part_top[head + s * GROUP] - all_top);
for (uint d = lane; d < uint(DIM); d += 32) {
  float value = 0.0f;
  for (int s = 0; s < SPLITS; s++) value += part[head + s * GROUP][d] * metal::exp(part_top[head + s * GROUP] - all_top);
  y[q_start + d] = T(value / total);
}
