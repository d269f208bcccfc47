// As `add_rms_norm`, of a layer's output to which the row's own adapter adds first: what `lora` and then that would do.
// x, y [rows, D]  u [rows, IN], the input of the layer that made y  index [rows]: 0 is no adapter
// a [adapters, IN, RANK]  b [adapters, RANK, D]  gain, shift [adapters, D] where GAIN, SHIFT  w [D]
//   →  h = x + adapted y, out = its norm, [rows, D]      template of both, ITEMS = ceil(D / threads)
threadgroup float scratch[32];
threadgroup float part[SIMDGROUPS * 32 * PACK];
threadgroup float inner[RANK];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const size_t start = size_t(row) * D;
const uint adapter = uint(index[row]);
if (adapter > 0)  // the same in the whole threadgroup
  times_a<S, IN, RANK, PACK, COLUMNS, STEPS, DEPTH, SIMDGROUPS>(
      u + size_t(row) * IN, a + size_t(adapter) * IN * RANK, part, inner, thread_index, lane);
const size_t side = size_t(adapter) * D;
float v[ITEMS];
float squares = 0.0f;
for (int k = 0; k < ITEMS; k++) {
  const uint i = thread_index + uint(k) * threads;
  v[k] = 0.0f;
  if (i < uint(D)) {
    float made = float(y[start + i]);
    if (adapter > 0)
      made = float(T(adapted<RANK, GAIN, SHIFT>(made, b + side * RANK, gain + side, shift + side, inner, uint(D), i)));
    const T sum = T(float(x[start + i]) + made);
    h[start + i] = sum;
    v[k] = float(sum);
  }
  squares += v[k] * v[k];
}
const float total = group_sum(squares, scratch, lane, simdgroup, threads / 32);
const float inverse = metal::rsqrt(total / float(D) + as_type<float>(uint(EPS)));
for (int k = 0; k < ITEMS; k++) {
  const uint i = thread_index + uint(k) * threads;
  if (i < uint(D)) out[start + i] = T(v[k] * inverse * float(w[i]));
}
