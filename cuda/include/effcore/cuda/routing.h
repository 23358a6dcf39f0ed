// Token movement on NVIDIA GPUs (sm_80 and later): the functions of effcore/routing.h with the same arguments, which the caller
// has checked, but for the values of indices. An index out of range reads and writes nothing; a list that repeats a token where
// none may leaves rows undefined. float64 is refused. Two runs give identical bits. A failing launch throws std::runtime_error.
#pragma once
#include <cstddef>

#include "effcore/cuda/launch.h"
#include "effcore/routing.h"

namespace effcore::cuda::routing {

using effcore::routing::ClassScores;
using effcore::routing::Gather;
using effcore::routing::GatherNorm;
using effcore::routing::GatherNormBackward;
using effcore::routing::Merge;
using effcore::routing::Partition;
using effcore::routing::Scatter;
using effcore::routing::ScorePartition;

std::size_t workspace_bytes(const Partition& args);
std::size_t workspace_bytes(const ClassScores& args);
std::size_t workspace_bytes(const ScorePartition& args);
std::size_t workspace_bytes(const Gather& args);
std::size_t workspace_bytes(const Merge& args);
std::size_t workspace_bytes(const Scatter& args);
std::size_t workspace_bytes(const GatherNorm& args);
std::size_t workspace_bytes(const GatherNormBackward& args);

void partition(const Partition& args, const Launch& launch);
void class_scores(const ClassScores& args, const Launch& launch);
void score_partition(const ScorePartition& args, const Launch& launch);
void gather(const Gather& args, const Launch& launch);
void merge(const Merge& args, const Launch& launch);
void scatter(const Scatter& args, const Launch& launch);
void gather_norm(const GatherNorm& args, const Launch& launch);
void gather_norm_backward(const GatherNormBackward& args, const Launch& launch);

// Which kernels serve this dtype on the current GPU, for `effcore doctor`: "sm_80" (no products), or "none: " and why.
const char* path(DType dtype);

}  // namespace effcore::cuda::routing
