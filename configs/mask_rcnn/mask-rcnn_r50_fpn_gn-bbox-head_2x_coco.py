# BN* in the backbone (ImageNet statistics frozen; weight and bias train from stage 2 on); GN in the box head of four
# convolutions alone.
# Published: box/mask AP 39.5/34.4 (GN paper, arXiv 1803.08494, Table 5).
# Recipe: No weight decay on the norms, as in the source.
# Cost: 8 GPUs x 2 images, 24 epochs; estimate: 51 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of
# GN ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/4conv1fc.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
model = dict(roi_head=dict(bbox_head=dict(norm_cfg=dict(type="GN", num_groups=32, requires_grad=True))))
