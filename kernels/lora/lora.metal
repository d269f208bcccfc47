// Multi-adapter LoRA for one new token a row: out = gain · y + shift + (x A) B of the row's own adapter, in one launch.
// x [rows, IN]  y [rows, OUT]  a [adapters, IN, RANK]  b [adapters, RANK, OUT]  index [rows]: 0 is no adapter
// gain [adapters, OUT] where GAIN, shift [adapters, OUT] where SHIFT
// A threadgroup makes x A, and from it one output a thread.
threadgroup float part[SIMDGROUPS * 32 * PACK];
threadgroup float inner[RANK];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint o = threadgroup_position_in_grid.y * threads_per_threadgroup.x + thread_index;
const uint adapter = uint(index[row]);
const float base = o < uint(OUT) ? float(y[size_t(row) * OUT + o]) : 0.0f;
if (adapter == 0) {  // the same in the whole threadgroup
  if (o < uint(OUT)) out[size_t(row) * OUT + o] = T(base);
  return;
}
times_a<S, IN, RANK, PACK, COLUMNS, STEPS, DEPTH, SIMDGROUPS>(
    x + size_t(row) * IN, a + size_t(adapter) * IN * RANK, part, inner, thread_index, lane);
if (o < uint(OUT)) {
  const size_t start = size_t(adapter) * OUT;
  out[size_t(row) * OUT + o] =
      T(adapted<RANK, GAIN, SHIFT>(base, b + start * RANK, gain + start, shift + start, inner, uint(OUT), o));
}
