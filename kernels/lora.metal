// Multi-adapter LoRA for one new token a row: out = y + (x A) B of the row's own adapter, in one launch.
// x [rows, IN]  y [rows, OUT]  a [adapters, IN, RANK]  b [adapters, RANK, OUT]  index [rows]: 0 is no adapter
// gain [adapters, OUT], bias [OUT]: with DORA, out = gain · (y − bias + (x A) B) + bias
// A threadgroup makes x A, and from it `threads` of the outputs; COLUMNS is RANK rounded up to a power of two.
threadgroup float part[SIMDGROUPS * 32];
threadgroup float inner[RANK];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint o = threadgroup_position_in_grid.y * threads + thread_index;
const uint adapter = uint(index[row]);
if (adapter == 0) {  // the same in the whole threadgroup
  if (o < uint(OUT)) out[size_t(row) * OUT + o] = y[size_t(row) * OUT + o];
  return;
}
// Neighbours read neighbours: a thread has one column of A, and every (threads / COLUMNS)th of its rows.
const uint column = thread_index % uint(COLUMNS);
const size_t x_start = size_t(row) * IN;
const size_t a_start = size_t(adapter) * IN * RANK;
float sum = 0.0f;
for (int k = 0; k < STEPS; k++) {
  const uint i = thread_index / uint(COLUMNS) + uint(k) * (uint(SIMDGROUPS) * 32 / uint(COLUMNS));
  if (i < uint(IN) && column < uint(RANK)) sum += float(x[x_start + i]) * float(a[a_start + size_t(i) * RANK + column]);
}
for (uint step = uint(COLUMNS); step < 32; step <<= 1) sum += metal::simd_shuffle_xor(sum, ushort(step));
part[thread_index] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_index < uint(RANK)) {
  float whole = 0.0f;
  for (uint s = thread_index / 32; s < uint(SIMDGROUPS); s += (uint(COLUMNS) + 31) / 32) whole += part[s * 32 + lane];
  inner[thread_index] = whole;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (o < uint(OUT)) {
  const size_t b_start = size_t(adapter) * RANK * OUT + o;
  float update = 0.0f;
  for (int k = 0; k < RANK; k++) update += inner[k] * float(b[b_start + size_t(k) * OUT]);
  const float base = float(y[size_t(row) * OUT + o]);
  float result = base + update;
  if (DORA) {
    const float constant_part = float(bias[o]);
    result = float(gain[size_t(adapter) * OUT + o]) * (base - constant_part + update) + constant_part;
  }
  out[size_t(row) * OUT + o] = T(result);
}
