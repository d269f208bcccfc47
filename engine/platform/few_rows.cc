// Products of few rows, c [m][n] = alpha · a [m][k] · b [k][n] + beta · c, in place of the BLAS's `cblas_sgemm`, which gets all
// others. A BLAS copies b into an order of its own first: with few rows that is most of what it does. Here each number of b is
// read once, in the order in which it lies, as memory gives it fastest. a and b may lie as their transposes do, and c may have
// few columns instead, as attention's scores have.
//
// The sum of a number of c is made in one order, however many rows there are: a row does not depend on the others.
#include <cstddef>
#include <type_traits>

namespace {

// Lanes of a register. Of [n][k], how many rows of b a tile has: next to up to FEW rows of a, and to up to MANY; sums, a lane of
// a and one of each row of b fit into the registers. Of [k][n], DEPTH rows of b are added at once. MOST: rows of a
// with [n][k] from which on OpenBLAS is as fast; with [k][n] it is from MANY on.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, OF_FEW = 4, OF_MANY = 3, DEPTH = 8, MOST = 32;
#define REGISTER "+v"
#elif defined(__AVX__)
constexpr int WIDTH = 8, OF_FEW = 2, OF_MANY = 1, DEPTH = 8, MOST = 12;
#define REGISTER "+x"
#elif defined(__aarch64__)
constexpr int WIDTH = 4, OF_FEW = 4, OF_MANY = 3, DEPTH = 8, MOST = 16;
#define REGISTER "+w"
#else
#error "no registers are known for this processor"
#endif
constexpr int FEW = 4, MANY = 8;
#define UNROLLED _Pragma("GCC unroll 8")

typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

// `row` and `column`: from a number to the next one's place, down and to the right.
struct Steps {
  std::size_t row, column;
};

// `b_row`: from a row of b to the next, or of its transpose.
struct Product {
  int m, n, k;
  float alpha, beta;
  Steps a;
  std::size_t b_row;
  Steps c;
};

// What c begins with; what it has is not read where nothing of it is wanted.
inline float begun(const Product &of, const float *c) { return of.beta == 0 ? 0.0f : of.beta * *c; }

inline Lanes load(const float *from) {
  Lanes lanes = *reinterpret_cast<const Lanes *>(from);
  // Else g++ loads the same lanes again for each product that they are in.
  __asm__("" : REGISTER(lanes));
  return lanes;
}

inline void store(float *to, Lanes lanes) { *reinterpret_cast<Lanes *>(to) = lanes; }

// The sum of lanes, halves upon halves.
template <int LANES>
inline float total(const float *lanes) {
  typedef float Half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
  const Half both = *reinterpret_cast<const Half *>(lanes) + *reinterpret_cast<const Half *>(lanes + LANES / 2);
  return total<LANES / 2>(reinterpret_cast<const float *>(&both));
}
template <>
inline float total<2>(const float *lanes) {
  return lanes[0] + lanes[1];
}

// The end of a tile: what is left of k behind `i`, the lanes' sums, and c. Not of the template: it would be compiled for each.
__attribute__((noinline)) void finish(const Product &of, const Lanes *sums, int rows, int columns, int i, const float *a,
                                      const float *b, float *c) {
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) {
      float sum = total<WIDTH>(reinterpret_cast<const float *>(sums + row * columns + column));
      for (int rest = i; rest < of.k; rest++) sum += a[row * of.a.row + rest] * b[column * of.b_row + rest];
      float *const to = c + row * of.c.row + column * of.c.column;
      *to = of.alpha * sum + begun(of, to);
    }
}

template <int ROWS, int COLUMNS>
void tile(const Product &of, const float *a, const float *b, float *c) {
  Lanes sums[ROWS][COLUMNS];
  UNROLLED for (int row = 0; row < ROWS; row++)
    UNROLLED for (int column = 0; column < COLUMNS; column++) sums[row][column] = Lanes{0};
  int i = 0;
  for (; i + WIDTH <= of.k; i += WIDTH) {
    Lanes weights[COLUMNS];
    UNROLLED for (int column = 0; column < COLUMNS; column++) {
      weights[column] = load(b + column * of.b_row + i);
      // The next tile's: it may be beyond b, which does no harm.
      __builtin_prefetch(b + (column + COLUMNS) * of.b_row + i);
    }
    UNROLLED for (int row = 0; row < ROWS; row++) {
      const Lanes x = load(a + row * of.a.row + i);
      UNROLLED for (int column = 0; column < COLUMNS; column++) sums[row][column] += x * weights[column];
    }
  }
  Lanes kept[ROWS * COLUMNS];
  UNROLLED for (int row = 0; row < ROWS; row++)
    UNROLLED for (int column = 0; column < COLUMNS; column++) kept[row * COLUMNS + column] = sums[row][column];
  finish(of, kept, ROWS, COLUMNS, i, a, b, c);
}

template <int COLUMNS>
void tile_of(int rows, const Product &of, const float *a, const float *b, float *c) {
  switch (rows) {
    case 1: return tile<1, COLUMNS>(of, a, b, c);
    case 2: return tile<2, COLUMNS>(of, a, b, c);
    case 3: return tile<3, COLUMNS>(of, a, b, c);
    case 4: return tile<4, COLUMNS>(of, a, b, c);
    case 5: return tile<5, COLUMNS>(of, a, b, c);
    case 6: return tile<6, COLUMNS>(of, a, b, c);
    case 7: return tile<7, COLUMNS>(of, a, b, c);
    default: return tile<8, COLUMNS>(of, a, b, c);
  }
}

template <int COLUMNS>
void times_transposed(const Product &of, const float *a, const float *b, float *c) {
  auto all_rows = [&](auto columns, int column) {
    for (int row = 0; row < of.m; row += MANY)
      tile_of<columns>(of.m - row < MANY ? of.m - row : MANY, of, a + row * of.a.row, b + column * of.b_row,
                       c + row * of.c.row + column * of.c.column);
  };
  int column = 0;
  for (; column + COLUMNS <= of.n; column += COLUMNS) all_rows(std::integral_constant<int, COLUMNS>(), column);
  for (; column < of.n; column++) all_rows(std::integral_constant<int, 1>(), column);
}

// Add COUNT rows of b to c, each as often as the rows of a say.
template <int COUNT>
void add_rows(const Product &of, const float *a, const float *b, float *c) {
  int i = 0;
  for (; i + WIDTH <= of.n; i += WIDTH) {
    Lanes weights[COUNT];
    UNROLLED for (int each = 0; each < COUNT; each++) weights[each] = load(b + each * of.b_row + i);
    for (int row = 0; row < of.m; row++) {
      Lanes sum = load(c + row * of.c.row + i);
      UNROLLED for (int each = 0; each < COUNT; each++)
        sum += of.alpha * a[row * of.a.row + each * of.a.column] * weights[each];
      store(c + row * of.c.row + i, sum);
    }
  }
  for (; i < of.n; i++)
    for (int row = 0; row < of.m; row++)
      for (int each = 0; each < COUNT; each++)
        c[row * of.c.row + i] += of.alpha * a[row * of.a.row + each * of.a.column] * b[each * of.b_row + i];
}

void times(const Product &of, const float *a, const float *b, float *c) {
  for (int row = 0; row < of.m; row++)
    for (int i = 0; i < of.n; i++) c[row * of.c.row + i] = begun(of, c + row * of.c.row + i);
  int i = 0;
  for (; i + DEPTH <= of.k; i += DEPTH) add_rows<DEPTH>(of, a + i * of.a.column, b + i * of.b_row, c);
  for (; i < of.k; i++) add_rows<1>(of, a + i * of.a.column, b + i * of.b_row, c);
}

typedef void Sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };
Sgemm *blas = nullptr;
int most = 0;

}  // namespace

// `of`: the BLAS's own `cblas_sgemm`. `here`: whether few rows are taken here.
extern "C" void few_rows_begin(Sgemm *of) { blas = of; }
extern "C" void few_rows_switch(int here) { most = here ? MOST : 0; }

extern "C" void cblas_sgemm(int order, int a_turned, int b_turned, int m, int n, int k, float alpha, const float *a,
                            int a_row, const float *b, int b_row, float beta, float *c, int c_row) {
  const bool as_it_is = a_turned == AS_IT_IS, transposed = b_turned == TRANSPOSED;
  const std::size_t a_step = a_row, b_step = b_row, c_step = c_row;
  if (order == ROW_MAJOR && as_it_is && transposed && m <= most) {
    const Product of{m, n, k, alpha, beta, {a_step, 1}, b_step, {c_step, 1}};
    m <= FEW ? times_transposed<OF_FEW>(of, a, b, c) : times_transposed<OF_MANY>(of, a, b, c);
  } else if (order == ROW_MAJOR && as_it_is && transposed && n <= FEW && most > 0) {
    // The same of the transposes.
    const Product of{n, m, k, alpha, beta, {b_step, 1}, a_step, {1, c_step}};
    times_transposed<OF_FEW>(of, b, a, c);
  } else if (order == ROW_MAJOR && !transposed && m <= MANY && most > 0) {
    times({m, n, k, alpha, beta, as_it_is ? Steps{a_step, 1} : Steps{1, a_step}, b_step, {c_step, 1}}, a, b, c);
  } else {
    blas(order, a_turned, b_turned, m, n, k, alpha, a, a_row, b, b_row, beta, c, c_row);
  }
}
