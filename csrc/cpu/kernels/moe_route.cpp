#include "moe_route.h"

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

// probs[0..E) = softmax(logits); the padding up to a whole vector becomes -1, below every probability.
template <class T>
void softmax(const T* logits, float* probs, int64_t E) {
  F top = set1(-__builtin_inff());
  int64_t e = 0;
  for (; e + W <= E; e += W) top = vmax(top, load(logits + e));
  float largest = hmax(top);
  for (; e < E; ++e) largest = to_float(logits[e]) > largest ? to_float(logits[e]) : largest;
  F total = zero();
  for (e = 0; e < E; e += W) {
    store(probs + e, vexp(sub(load_upto(logits + e, E - e), set1(largest))));
    total = add(total, load_upto(probs + e, E - e));
  }
  const F sum = set1(hsum(total));
  for (e = 0; e < E; e += W) store(probs + e, div(load(probs + e), sum));
  for (int64_t i = E; i % W != 0; ++i) probs[i] = -1.0f;
}

template <class T>
void token(const MoeRouteArgs& a, int64_t t, float* probs) {
  softmax<T>((const T*)a.logits + t * a.logits_stride, probs, a.E);
  T* weights = (T*)a.weights_out + t * a.K;
  int64_t* indices = a.indices_out + t * a.K;
  float sum = 0.0f, chosen[kMaxRouteExperts];
  for (int64_t k = 0; k < a.K; ++k) {
    F top = load(probs);
    for (int64_t e = W; e < a.E; e += W) top = vmax(top, load(probs + e));
    const float largest = hmax(top);
    // A row with NaN matches nothing: still give distinct ids inside the range.
    int64_t best = 0;
    while (best < a.E && probs[best] != largest) ++best;
    if (best == a.E) {
      for (best = 0; best < a.E && probs[best] == -2.0f; ++best) {
      }
    }
    indices[k] = best;
    chosen[k] = probs[best];
    sum += probs[best];
    probs[best] = -2.0f;
  }
  for (int64_t k = 0; k < a.K; ++k) weights[k] = from_float<T>(a.norm ? chosen[k] / sum : chosen[k]);
}

}  // namespace

void moe_route(const MoeRouteArgs& a, int64_t token0, int64_t token1) {
  alignas(64) float probs[kMaxRouteExperts + 16];
  for (int64_t t = token0; t < token1; ++t) {
    of_type(a.dtype, [&](auto type) { token<decltype(type)>(a, t, probs); });
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
