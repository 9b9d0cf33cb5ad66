// Takes chunks of chains through all steps of a block.
#include "cpu/chain.h"

#include <algorithm>

#include "cpu/step.h"

namespace fastlangevin {
namespace cpu {
namespace {

// A step of the chains [first, first + chains) alone, with their gradient at `grad`.
Step part_of(const Step& step, int64_t first, int64_t chains, float* grad) {
  Step part = step;
  part.shape[0] = chains;
  part.x.data = static_cast<float*>(step.x.data) + first * step.x.strides[0];
  if (step.grad.data != nullptr) part.grad.data = grad;
  if (step.scales != nullptr) part.scales += first * step.scales_stride;
  if (step.noise_stds != nullptr) part.noise_stds += first * step.noise_stds_stride;
  part.first_chain += static_cast<uint32_t>(first);
  return part;
}

}  // namespace

void convnet_chain(const ConvNet& net, const ConvBatch& batch, const std::vector<Step>& steps,
                   void* workspace, int threads) {
  size_t gradients = steps.size();  // the last gradient is in front of this step
  while (gradients > 0 && steps[gradients - 1].grad.data == nullptr) --gradients;
  each_share(net, batch, workspace, threads,
             [&](int64_t thread, int64_t begin, int64_t end, void* own) {
               ConvBatch part = batch;
               part.grad += std::min(thread * batch.chunk, begin) * batch.grad_strides[0];
               for (int64_t first = begin; first < end; first += batch.chunk) {
                 part.chains = std::min(batch.chunk, end - first);
                 part.x = batch.x + first * batch.x_strides[0];
                 if (batch.constants != nullptr) {
                   part.constants = batch.constants + first * batch.constants_stride;
                 }
                 for (size_t k = 0; k < steps.size(); ++k) {
                   const bool energies = batch.energies != nullptr && k + 1 == gradients;
                   part.energies = energies ? batch.energies + first : nullptr;
                   if (steps[k].grad.data != nullptr)
                     score_kernel(net)(net, part, 0, part.chains, own);
                   langevin_step(part_of(steps[k], first, part.chains, part.grad), 1);
                 }
               }
             });
}

}  // namespace cpu
}  // namespace fastlangevin
