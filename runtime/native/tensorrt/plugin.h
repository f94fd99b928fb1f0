// cembed::MaxSim for TensorRT 10.3 and later: scores of one query with many pages.
//
// inputs   query    half    [Q, D]
//          pages    half    [N, D]     rows of all pages, one page after the other
//                   or int8 [N, D]     levels, zero point 0
//          offsets  int64   [P + 1]    first row of each page, and N
//          scales   float   [P]        with int8 only: what a page's levels are multiplied with
// output   scores   float   [P]        minus infinity for a page without rows
//
// D is a multiple of 8, with int8 of 16. It has no attributes: nothing is serialised.
#ifndef CEMBED_TENSORRT_PLUGIN_H
#define CEMBED_TENSORRT_PLUGIN_H

#include <NvInferRuntime.h>

namespace cembed {

class MaxSim final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
  public:
    nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3 *clone() noexcept override;

    const char *getPluginName() const noexcept override;
    const char *getPluginVersion() const noexcept override;
    const char *getPluginNamespace() const noexcept override;

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType *types, int32_t outputs, const nvinfer1::DataType *given,
                               int32_t inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs *given, int32_t inputs, const nvinfer1::DimsExprs *,
                            int32_t, nvinfer1::DimsExprs *shapes, int32_t outputs,
                            nvinfer1::IExprBuilder &builder) noexcept override;
    bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc *tensors, int32_t inputs,
                                   int32_t outputs) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *given, int32_t inputs,
                            const nvinfer1::DynamicPluginTensorDesc *, int32_t) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *given, int32_t inputs,
                            const nvinfer1::DynamicPluginTensorDesc *, int32_t) const noexcept override;

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc *given, int32_t inputs,
                          const nvinfer1::PluginTensorDesc *, int32_t) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc *given, const nvinfer1::PluginTensorDesc *made,
                    const void *const *inputs, void *const *outputs, void *workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *) noexcept override;
    const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override;

  private:
    bool levels_ = false; // pages are int8: known once shapes are
};

class MaxSimCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    nvinfer1::IPluginV3 *createPlugin(const char *, const nvinfer1::PluginFieldCollection *,
                                      nvinfer1::TensorRTPhase) noexcept override;
    const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override;
    const char *getPluginName() const noexcept override;
    const char *getPluginVersion() const noexcept override;
    const char *getPluginNamespace() const noexcept override;
};

} // namespace cembed

#endif
