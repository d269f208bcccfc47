// One threadgroup a row: h = x + r rounded to T, y = (h − mean) / sqrt(variance + eps) · w + b. The row stays in registers.
// x, r [rows, D]  w, b [D]  →  y [rows, D]      template T, D, ITEMS = ceil(D / threads), EPS: the bits of eps
threadgroup float sums[32];
threadgroup float squares[32];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const size_t start = size_t(row) * D;
float v[ITEMS];
float sum = 0.0f;
for (int k = 0; k < ITEMS; k++) {
  const uint i = thread_index + uint(k) * threads;
  v[k] = i < uint(D) ? float(T(float(x[start + i]) + float(r[start + i]))) : 0.0f;
  sum += v[k];
}
const float mean = group_sum(sum, sums, lane, simdgroup, threads / 32) / float(D);
float deviation = 0.0f;
for (int k = 0; k < ITEMS; k++) {
  if (thread_index + uint(k) * threads < uint(D)) deviation += (v[k] - mean) * (v[k] - mean);
}
const float variance = group_sum(deviation, squares, lane, simdgroup, threads / 32) / float(D);
const float inverse = metal::rsqrt(variance + as_type<float>(uint(EPS)));
for (int k = 0; k < ITEMS; k++) {
  const uint i = thread_index + uint(k) * threads;
  if (i < uint(D)) y[start + i] = T((v[k] - mean) * inverse * float(w[i]) + float(b[i]));
}
