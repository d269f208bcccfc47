// Attention of one query over keys and values as they are stored, the softmax as it goes (Milakov and Gimelshein, 2018).
// A simdgroup has one head and every SPLITSth batch of keys; DIM / PACK lanes have a key, each PACK of its numbers.
#ifndef inline_function
#define inline_function inline
#endif

// How a lane reads and writes what is kept of a head: with BITS 16 the numbers as they are, in T; else `codes.h` has it.
template <typename T, int BITS, int DIM, int PACK, int GROUPED>
struct Kept;
template <typename T, int DIM, int PACK, int GROUPED>
struct Kept<T, 16, DIM, PACK, GROUPED> {
  typedef uint4 Loaded;
  template <typename P>
  static inline_function Loaded load(P head, uint piece) {
    return DEVICE_POINTER(uint4, head)[piece];
  }
  static inline_function float at(Loaded loaded, int d) { return Packed<T>::at(loaded, d); }
  // The lane's numbers x [PACK] become those that are kept. Where `writes`, the head gets them.
  template <typename X, typename P>
  static inline_function void keep(X x, P head, uint piece, bool writes) {
    for (int d = 0; d < PACK && writes; d++) head[piece * uint(PACK) + uint(d)] = T(x[d]);
  }
};

// Take DEPTH batches of keys and values (capacity, WIDTH), from `batch` on and before `end`, into `top_sum`, the greatest score
// so far and the sum of the weights, and `sum_v` [PACK], the weighted values: each lane's own, of the keys that it has.
// The first `shared` of them lie from `run` on, the others at their own number + `own`, modulo 2³²: where keys lie changes
// neither which lane has one nor the order in which they are added up.
template <typename Form, int LANES, int PACK, int WIDTH, int DEPTH, typename Q, typename K, typename V, typename S, typename W>
inline_function void attend_to_stored(Q query, K keys, V values, uint batch, uint end, uint run, uint shared, uint own, S top_sum, W sum_v, uint lane) {
  constexpr int KEYS = 32 / LANES;
  const uint piece = lane % uint(LANES);
  // Some keys a lane, so that the loads of all are under way together.
  typename Form::Loaded old_key[DEPTH];
  typename Form::Loaded old_value[DEPTH];
  float score[DEPTH];
  float new_top = top_sum[0];
  for (int n = 0; n < DEPTH; n++) {
    const uint i = metal::min(batch + uint(n) * KEYS + lane / LANES, end - 1);
    const size_t at = size_t(i + (i < shared ? run : own)) * WIDTH;
    old_key[n] = Form::load(keys + at, piece);
    old_value[n] = Form::load(values + at, piece);
  }
  for (int n = 0; n < DEPTH; n++) {
    float product = 0.0f;
    for (int d = 0; d < PACK; d++) product += query[d] * Form::at(old_key[n], d);
    for (uint step = LANES / 2; step > 0; step >>= 1) product += metal::simd_shuffle_xor(product, ushort(step));
    score[n] = batch + uint(n) * KEYS + lane / LANES < end ? product : -3e38f;
    new_top = metal::max(new_top, score[n]);
  }
  const float fade = metal::exp(top_sum[0] - new_top);
  top_sum[0] = new_top;
  top_sum[1] *= fade;
  for (int d = 0; d < PACK; d++) sum_v[d] *= fade;
  for (int n = 0; n < DEPTH; n++) {
    const float weight = score[n] > -3e38f ? metal::exp(score[n] - new_top) : 0.0f;
    top_sum[1] += weight;
    for (int d = 0; d < PACK; d++) sum_v[d] += weight * Form::at(old_value[n], d);
  }
}

// Put together what the lanes, then the simdgroups of a head have, and write y [DIM]. `sink`: a score without a value that
// takes its share of the weights; −3e38: none. By the whole threadgroup: one barrier.
// part [GROUP · SPLITS][DIM], part_top and part_sum [GROUP · SPLITS]: threadgroup floats.
template <typename T, int DIM, int PACK, int GROUP, int SPLITS, typename S, typename W, typename P, typename G, typename Y>
inline_function void write_attended(S top_sum, W sum_v, float sink, P part, G part_top, G part_sum, Y y, uint simdgroup, uint lane) {
  constexpr int LANES = DIM / PACK;
  const uint piece = lane % uint(LANES);
  const uint head = simdgroup % uint(GROUP);
  const float head_top = metal::simd_max(top_sum[0]);
  const float share = metal::exp(top_sum[0] - head_top);
  const float sum = metal::simd_sum(piece == 0 ? top_sum[1] * share : 0.0f);
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
  if (simdgroup >= uint(GROUP)) return;
  float all_top = sink;
  for (int s = 0; s < SPLITS; s++) all_top = metal::max(all_top, part_top[head + s * GROUP]);
  float total = metal::exp(sink - all_top);
  for (int s = 0; s < SPLITS; s++) total += part_sum[head + s * GROUP] * metal::exp(part_top[head + s * GROUP] - all_top);
  for (uint d = lane; d < uint(DIM); d += 32) {
    float whole = 0.0f;
    for (int s = 0; s < SPLITS; s++) whole += part[head + s * GROUP][d] * metal::exp(part_top[head + s * GROUP] - all_top);
    y[d] = T(whole / total);
  }
}
