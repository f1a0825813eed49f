// moe_align: (token, choice) pairs sorted by expert, each expert's filled up to whole blocks: what a grouped product of
// blocks of rows reads. One block of threads, stable: a pair stands behind those of its expert that came before it.
#include "common.cuh"

namespace qwenopt {

struct MoeAlignArgs {
  const int64_t* indices;  // [P] experts 0..E; E, and what is no expert, is left out
  int32_t* sorted;         // [capacity] pairs; P where a block is filled up
  int32_t* block_experts;  // [capacity / block] the expert of each block; -1 behind the last one
  int32_t* num_sorted;     // [1] whole blocks' worth of pairs
  int32_t* offsets;        // [E + 1] where each expert begins in `sorted`
  int64_t P, E, block, capacity;
};

constexpr int kAlignWarps = 16, kAlignThreads = kAlignWarps * kWarp;
constexpr int kMostExperts = 512;

struct AlignCounts {
  int32_t of[kAlignWarps][kMostExperts];  // pairs of each warp, then where its next one goes
  int32_t begin[kMostExperts + 1];
  int32_t sums[kAlignWarps];
};

// Pairs are shared out to the warps in order: warp w has those from w * share on.
QWENOPT_FN int64_t align_share(const MoeAlignArgs& a) { return blocks_of(blocks_of(a.P, kWarp), kAlignWarps) * kWarp; }

// Which expert a pair is for; E where for none.
QWENOPT_FN int32_t expert_of(const MoeAlignArgs& a, int64_t pair, int64_t end) {
  const int64_t expert = pair < end ? a.indices[pair] : a.E;
  return int32_t(expert >= 0 && expert < a.E ? expert : a.E);
}

// Lanes whose pair is for the same expert.
QWENOPT_FN uint32_t same_expert(int32_t expert) { return __match_any_sync(kAllLanes, expert); }

QWENOPT_FN void count_pairs(const MoeAlignArgs& a, int32_t* counts, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p += kWarp) {
    const int32_t expert = expert_of(a, p + lane_id(), end);
    const uint32_t same = same_expert(expert);
    const bool first = (same & ((1u << lane_id()) - 1)) == 0;
    if (first && expert < a.E) counts[expert] += __popc(same);
    __syncwarp();
  }
}

// Thread e: how many of expert e each warp has becomes where in its part that warp begins. Returns the sum in blocks.
QWENOPT_FN int32_t warps_before(const MoeAlignArgs& a, AlignCounts& counts, int e) {
  int32_t sum = 0;
  for (int w = 0; w < kAlignWarps; ++w) {
    const int32_t mine = counts.of[w][e];
    counts.of[w][e] = sum;
    sum += mine;
  }
  return int32_t(blocks_of(sum, a.block) * a.block);
}

QWENOPT_FN void align_pairs(const MoeAlignArgs& a) {
  QWENOPT_SHARED(AlignCounts, counts);
  const int e = int(threadIdx.x);
  for (int w = 0; w < kAlignWarps; ++w) counts.of[w][e] = 0;
  __syncthreads();
  const int64_t begin = warp_id() * align_share(a), end = least(begin + align_share(a), a.P);
  count_pairs(a, counts.of[warp_id()], begin, end);
  __syncthreads();
  const int32_t padded = e < a.E ? warps_before(a, counts, e) : 0;
  const int32_t upto = warp_scan(padded);
  if (lane_id() == kWarp - 1) counts.sums[warp_id()] = upto;
  __syncthreads();
  int32_t start = upto - padded;
  for (int w = 0; w < warp_id(); ++w) start += counts.sums[w];
  counts.begin[e] = start;
  if (e == kAlignThreads - 1) counts.begin[kMostExperts] = start + padded;
  __syncthreads();
  const int32_t total = counts.begin[kMostExperts];
  if (e <= a.E) a.offsets[e] = e < a.E ? start : total;
  if (e == 0 && a.E == kMostExperts) a.offsets[kMostExperts] = total;
  if (e == 0) *a.num_sorted = total;
  for (int64_t i = e; i < a.capacity; i += kAlignThreads) a.sorted[i] = int32_t(a.P);
  for (int64_t b = total / a.block + e; b < a.capacity / a.block; b += kAlignThreads) a.block_experts[b] = -1;
  for (int32_t at = start; at < start + padded; at += int32_t(a.block)) a.block_experts[at / a.block] = e;
  __syncthreads();
  int32_t* next = counts.of[warp_id()];
  for (int64_t p = begin; p < end; p += kWarp) {
    const int32_t expert = expert_of(a, p + lane_id(), end);
    const uint32_t same = same_expert(expert);
    const uint32_t before = same & ((1u << lane_id()) - 1);
    if (expert < a.E) a.sorted[counts.begin[expert] + next[expert] + __popc(before)] = int32_t(p + lane_id());
    __syncwarp();
    if (before == 0 && expert < a.E) next[expert] += __popc(same);
    __syncwarp();
  }
}

QWENOPT_KERNEL(moe_align, MoeAlignArgs, kAlignThreads, align_pairs(a))

}  // namespace qwenopt
