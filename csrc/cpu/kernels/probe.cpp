#include "probe.h"

#include "vec.h"
#if defined(QWENOPT_ISA_AMX)
#include "tile.h"
#endif

namespace qwenopt {
namespace QWENOPT_ISA_NS {

uint64_t read_all(const uint64_t* data, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  int64_t i = begin;
#if defined(QWENOPT_ISA_AVX512)
  __m512i acc[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (; i + 32 <= end; i += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[j] = _mm512_add_epi64(acc[j], _mm512_loadu_si512(data + i + 8 * j));
  }
  const __m512i total = _mm512_add_epi64(_mm512_add_epi64(acc[0], acc[1]), _mm512_add_epi64(acc[2], acc[3]));
  sum = uint64_t(_mm512_reduce_add_epi64(total));
#endif
  for (; i < end; ++i) sum += data[i];
  return sum;
}

#if defined(QWENOPT_ISA_AMX)
double multiply_registers(int64_t iterations, float* sink) {
  tiles_begin();
  alignas(64) float sums[kTileWords];
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  tile_zero<4>();
  tile_zero<5>();
  for (int64_t i = 0; i < iterations; ++i) {
    tile_step<0, 4, 5>();
    tile_step<1, 4, 5>();
    tile_step<2, 4, 5>();
    tile_step<3, 4, 5>();
  }
  tile_store<0>(sums, 64);
  tiles_end();
  *sink = sums[0];
  return 2.0 * kTile * kTile * kTileK * 4 * double(iterations);
}
#else
double multiply_registers(int64_t iterations, float* sink) {
#if defined(QWENOPT_ISA_BF16)
  using D = Dot<bf16>;
  constexpr int kChains = 12;
  const __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3c00);
#else
  using D = Dot<float>;
  constexpr int kChains = 10;
  const F a = set1(1.0f), b = set1(0.0078125f);
#endif
  F acc[kChains];
#pragma GCC unroll 12
  for (int j = 0; j < kChains; ++j) acc[j] = zero();
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) acc[j] = D::step(acc[j], a, b);
  }
  F total = acc[0];
  for (int j = 1; j < kChains; ++j) total = add(total, acc[j]);
  *sink = hsum(total);
  return 2.0 * double(D::STEP) * kChains * double(iterations);
}
#endif

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
