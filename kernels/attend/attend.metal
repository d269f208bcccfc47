// Attention of one new token a row, from the projections on: what the row's own adapter adds to them, an RMSNorm over each
// head where the model has one, the rotation by the row's own position, and attention over what is stored and the new
// token. A row reads its own positions and no more, without mask and without padding. The new token's rotated keys and its
// values come out next to the result.
// One threadgroup for TOGETHER heads of a row, of those that share keys and values; a simdgroup has one head and every SPLITSth
// batch of keys. LANES lanes have a key, each PACK of its numbers, loaded at once. With BITS 8 or 4 keys and values are kept as
// words (`codes.h`), also the new token's, which attends to what they stand for, as later tokens do; WIDTH of a head.
// q, k, v [rows, Q_ROW, K_ROW, V_ROW], each from its START on
// stored [heads of some layers, positions, WIDTH]: a layer has KV_HEADS of keys, then as many of values
// fresh [rows, heads of the layers before, WIDTH], absent where FIRST: says which of these layers this is
// segment [rows, 3]: where the positions begin that a row shares, how many those are, where its own behind them begin  offset [rows]  period [DIM / 2] float32  q_weight, k_weight [DIM]
// where ADAPTED (1: q, 2: k, 4: v) x [rows, IN], what was projected, index [rows], and as in `lora` a0, b0, gain0, shift0 of
// q, 1 of k, 2 of v; GAIN and SHIFT in bits, too
//   →  y [rows, HEADS · DIM]  made [rows, heads up to this layer, WIDTH]: fresh, the new keys, the new values
// template T, DIM, BITS (16: WIDTH = DIM), WIDTH, GROUPED: numbers of a group, GROUP = HEADS / KV_HEADS, KV_HEADS, TOGETHER (1 or
// GROUP), SPLITS, DEPTH, PACK = 16 bytes / T, or 8 with fewer BITS, WINDOW (0: none), SCALE and EPS: their bits, NORM, FIRST, Q_ROW, K_ROW, V_ROW, Q_START, K_START, V_START; S, IN, RANK, A_PACK, COLUMNS, STEPS of `times_a`
typedef Kept<T, BITS, DIM, PACK, GROUPED> Form;
constexpr int LANES = DIM / PACK;
constexpr int KEYS = 32 / LANES;
threadgroup float part[TOGETHER * SPLITS][DIM];
threadgroup float part_top[TOGETHER * SPLITS];
threadgroup float part_sum[TOGETHER * SPLITS];
threadgroup float projected[(TOGETHER + 2) * DIM];
threadgroup float a_part[ADAPTED ? TOGETHER * SPLITS * 32 * A_PACK : 1];
threadgroup float inner_q[RANK];
threadgroup float inner_k[RANK];
threadgroup float inner_v[RANK];
const uint row = threadgroup_position_in_grid.x;
const uint kv_head = threadgroup_position_in_grid.y / uint(GROUP / TOGETHER);
const uint first_head = threadgroup_position_in_grid.y * uint(TOGETHER);
const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint head = simdgroup % uint(TOGETHER);
const uint split = simdgroup / uint(TOGETHER);
const uint piece = lane % uint(LANES);
const uint before = uint(fresh_shape[1]) * uint(!FIRST);

// --- The projections of the group's queries, of the key and of the value, with what the adapter adds, rounded as stored.
const uint adapter = ADAPTED ? uint(index[row]) : 0u;
if (adapter > 0) {  // the same in the whole threadgroup
  const size_t a_start = size_t(adapter) * IN * RANK;
  auto from = x + size_t(row) * IN;
  if (ADAPTED & 1)
    times_a<S, IN, RANK, A_PACK, COLUMNS, STEPS, DEPTH, TOGETHER * SPLITS>(from, a0 + a_start, a_part, inner_q, thread_index, lane);
  if (ADAPTED & 2)
    times_a<S, IN, RANK, A_PACK, COLUMNS, STEPS, DEPTH, TOGETHER * SPLITS>(from, a1 + a_start, a_part, inner_k, thread_index, lane);
  if (ADAPTED & 4)
    times_a<S, IN, RANK, A_PACK, COLUMNS, STEPS, DEPTH, TOGETHER * SPLITS>(from, a2 + a_start, a_part, inner_v, thread_index, lane);
}
const uint q_out = uint(GROUP * KV_HEADS * DIM);
const uint kv_out = uint(KV_HEADS * DIM);
for (uint i = thread_index; i < uint((TOGETHER + 2) * DIM); i += threads_per_threadgroup.x) {
  if (i < uint(TOGETHER * DIM)) {
    const uint o = first_head * DIM + i;
    const float base = float(q[size_t(row) * Q_ROW + Q_START + o]);
    const size_t start = size_t(adapter) * q_out;
    projected[i] = adapter == 0 || !(ADAPTED & 1) ? base
        : float(T(adapted<RANK, (GAIN & 1) != 0, (SHIFT & 1) != 0>(base, b0 + start * RANK, gain0 + start, shift0 + start, inner_q, q_out, o)));
  } else if (i < uint((TOGETHER + 1) * DIM)) {
    const uint o = kv_head * DIM + i - uint(TOGETHER * DIM);
    const float base = float(k[size_t(row) * K_ROW + K_START + o]);
    const size_t start = size_t(adapter) * kv_out;
    projected[i] = adapter == 0 || !(ADAPTED & 2) ? base
        : float(T(adapted<RANK, (GAIN & 2) != 0, (SHIFT & 2) != 0>(base, b1 + start * RANK, gain1 + start, shift1 + start, inner_k, kv_out, o)));
  } else {
    const uint o = kv_head * DIM + i - uint((TOGETHER + 1) * DIM);
    const float base = float(v[size_t(row) * V_ROW + V_START + o]);
    const size_t start = size_t(adapter) * kv_out;
    projected[i] = adapter == 0 || !(ADAPTED & 4) ? base
        : float(T(adapted<RANK, (GAIN & 4) != 0, (SHIFT & 4) != 0>(base, b2 + start * RANK, gain2 + start, shift2 + start, inner_v, kv_out, o)));
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// --- The query and the new key, normed and turned, and the new value: a lane has PACK numbers of each.
float query[PACK];
float query_pair[PACK];
float key[PACK];
float key_pair[PACK];
float value[PACK];
float q_squares = 0.0f;
float k_squares = 0.0f;
for (int d = 0; d < PACK; d++) {
  const uint i = piece * PACK + d;
  const uint pair = i < uint(DIM / 2) ? i + DIM / 2 : i - DIM / 2;
  query[d] = projected[head * DIM + i];
  query_pair[d] = projected[head * DIM + pair];
  key[d] = projected[TOGETHER * DIM + i];
  key_pair[d] = projected[TOGETHER * DIM + pair];
  value[d] = projected[(TOGETHER + 1) * DIM + i];
  q_squares += query[d] * query[d];
  k_squares += key[d] * key[d];
}
if (NORM) {
  const float q_inverse = metal::rsqrt(metal::simd_sum(lane < uint(LANES) ? q_squares : 0.0f) / float(DIM) + as_type<float>(uint(EPS)));
  const float k_inverse = metal::rsqrt(metal::simd_sum(lane < uint(LANES) ? k_squares : 0.0f) / float(DIM) + as_type<float>(uint(EPS)));
  for (int d = 0; d < PACK; d++) {
    const uint i = piece * PACK + d;
    const uint pair = i < uint(DIM / 2) ? i + DIM / 2 : i - DIM / 2;
    query[d] = float(T(query[d] * q_inverse * float(q_weight[i])));
    query_pair[d] = float(T(query_pair[d] * q_inverse * float(q_weight[pair])));
    key[d] = float(T(key[d] * k_inverse * float(k_weight[i])));
    key_pair[d] = float(T(key_pair[d] * k_inverse * float(k_weight[pair])));
  }
}
for (int d = 0; d < PACK; d++) {
  const uint i = piece * PACK + d;
  const float angle = float(offset[row]) / period[i % uint(DIM / 2)];
  const float c = metal::cos(angle);
  const float s = i < uint(DIM / 2) ? -metal::sin(angle) : metal::sin(angle);
  query[d] = float(T(query[d] * c + query_pair[d] * s)) * as_type<float>(uint(SCALE));
  key[d] = float(T(key[d] * c + key_pair[d] * s));
}

// --- What the next pass stores: this layer's new token behind those of the layers before.
const size_t made_start = size_t(row) * (before + 2 * KV_HEADS) * WIDTH;
const bool writes = first_head % uint(GROUP) == 0 && simdgroup == 0 && lane < uint(LANES);
Form::keep(key, made + (made_start + (before + kv_head) * WIDTH), piece, writes);
Form::keep(value, made + (made_start + (before + KV_HEADS + kv_head) * WIDTH), piece, writes);
const uint in_row = threadgroup_position_in_grid.y * threads_per_threadgroup.x + thread_index;
for (uint i = in_row; i < before * WIDTH; i += threads_per_threadgroup.x * uint(KV_HEADS * GROUP / TOGETHER))
  made[made_start + i] = fresh[size_t(row) * before * WIDTH + i];

// --- The new token is what the first split begins with; then what is stored.
const bool has_new = split == 0 && lane < uint(LANES);
float top_sum[2];
float sum_v[PACK];
float dot = 0.0f;
for (int d = 0; d < PACK; d++) dot += query[d] * key[d];
for (uint step = LANES / 2; step > 0; step >>= 1) dot += metal::simd_shuffle_xor(dot, ushort(step));
top_sum[0] = has_new ? dot : -3e38f;
top_sum[1] = has_new ? 1.0f : 0.0f;
for (int d = 0; d < PACK; d++) sum_v[d] = has_new ? value[d] : 0.0f;
const uint positions = uint(stored_shape[1]);
const uint end = metal::min(uint(offset[row]), positions);
const uint shared = metal::min(uint(segment[row * 3 + 1]), end);
const uint run = metal::min(uint(segment[row * 3]), positions - shared);
const uint own = metal::min(uint(segment[row * 3 + 2]), positions - (end - shared)) - shared;
const uint begin = WINDOW > 0 && end + 1 > uint(WINDOW) ? end + 1 - uint(WINDOW) : 0u;
const size_t keys_start = size_t(before + kv_head) * positions * WIDTH;
const size_t values_start = keys_start + size_t(KV_HEADS) * positions * WIDTH;
for (uint batch = begin + split * KEYS * DEPTH; batch < end; batch += SPLITS * KEYS * DEPTH)
  attend_to_stored<Form, LANES, PACK, WIDTH, DEPTH>(
      query, stored + keys_start, stored + values_start, batch, end, run, shared, own, top_sum, sum_v, lane);
write_attended<T, DIM, PACK, TOGETHER, SPLITS>(
    top_sum, sum_v, -3e38f, part, part_top, part_sum, y + (size_t(row) * KV_HEADS * GROUP + first_head + head) * DIM, simdgroup, lane);
