// Multi-adapter LoRA for one new token a row: out = gain · y + shift + (x A) B of the row's own adapter, in one launch.
// x [rows, IN]  y [rows, OUT]  a [adapters, IN, RANK]  b [adapters, RANK, OUT]  index [rows]: 0 is no adapter
// gain [adapters, OUT] where GAIN, shift [adapters, OUT] where SHIFT
// A threadgroup makes x A, and from it one output a thread. A row of A is loaded PACK numbers at once, by COLUMNS threads:
// RANK / PACK rounded up to a power of two.
threadgroup float part[SIMDGROUPS * 32 * PACK];
threadgroup float inner[RANK];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint o = threadgroup_position_in_grid.y * threads + thread_index;
const uint adapter = uint(index[row]);
const float base = o < uint(OUT) ? float(y[size_t(row) * OUT + o]) : 0.0f;
if (adapter == 0) {  // the same in the whole threadgroup
  if (o < uint(OUT)) out[size_t(row) * OUT + o] = T(base);
  return;
}
const uint column = thread_index % uint(COLUMNS);
const size_t x_start = size_t(row) * IN;
// Columns beyond the rank take its last ones, and nobody reads what they make.
const size_t a_start = size_t(adapter) * IN * RANK + metal::min(column, uint(RANK / PACK) - 1) * PACK;
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
    xs[n] = i < uint(IN) ? float(x[x_start + i]) : 0.0f;
    if (PACK > 1) words[n] = DEVICE_POINTER(uint4, a + a_start + size_t(held) * RANK)[0];
    else single[n] = float(a[a_start + size_t(held) * RANK]);
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
if (o < uint(OUT)) {
  const size_t b_start = size_t(adapter) * RANK * OUT + o;
  float update = 0.0f;
  for (int k = 0; k < RANK; k++) update += inner[k] * float(b[b_start + size_t(k) * OUT]);
  float result = GAIN ? base * float(gain[size_t(adapter) * OUT + o]) : base;
  if (SHIFT) result += float(shift[size_t(adapter) * OUT + o]);
  out[size_t(row) * OUT + o] = T(result + update);
}
