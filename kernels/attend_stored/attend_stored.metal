// Attention of one new token a row over keys and values of one layer as they are stored, the new token's among them. A row
// reads its own positions and no more, without mask and without padding.
// One threadgroup a head of a row, for the reason in `attend`; a simdgroup has every SPLITSth batch of keys (`stored.h`).
// q [rows, HEADS, DIM]  keys, values [slots, KV_HEADS, capacity, WIDTH], words with fewer BITS than 16 (`codes.h`)  offset [rows], the new token's position
// sinks [HEADS], where SINKS
//   →  y [rows, HEADS, DIM]
// template T, DIM, BITS, WIDTH, GROUPED, PACK as in `attend`, GROUP = HEADS / KV_HEADS, KV_HEADS, SPLITS, DEPTH, WINDOW (0: none),
// SCALE: its bits, SINKS
constexpr int LANES = DIM / PACK;
constexpr int KEYS = 32 / LANES;
threadgroup float part[SPLITS][DIM];
threadgroup float part_top[SPLITS];
threadgroup float part_sum[SPLITS];
const uint row = threadgroup_position_in_grid.x;
const uint head = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const size_t at = (size_t(row) * KV_HEADS * GROUP + head) * DIM;

float query[PACK];
float top_sum[2];
float sum_v[PACK];
for (int d = 0; d < PACK; d++) {
  query[d] = float(q[at + lane % uint(LANES) * PACK + d]) * as_type<float>(uint(SCALE));
  sum_v[d] = 0.0f;
}
top_sum[0] = -3e38f;
top_sum[1] = 0.0f;
const uint capacity = uint(keys_shape[2]);
const uint end = metal::min(uint(offset[row]) + 1u, capacity);
const uint begin = WINDOW > 0 && end > uint(WINDOW) ? end - uint(WINDOW) : 0u;
const size_t start = (size_t(row) * KV_HEADS + head / uint(GROUP)) * capacity * WIDTH;
for (uint batch = begin + simdgroup * KEYS * DEPTH; batch < end; batch += SPLITS * KEYS * DEPTH)
  attend_to_stored<Kept<T, BITS, DIM, PACK, GROUPED>, LANES, PACK, WIDTH, DEPTH>(query, keys + start, values + start, batch, end, 0u, 0u, 0u, top_sum, sum_v, lane);
write_attended<T, DIM, PACK, 1, SPLITS>(
    top_sum, sum_v, SINKS ? float(sinks[head]) : -3e38f, part, part_top, part_sum, y + at, simdgroup, lane);
