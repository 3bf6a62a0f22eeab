"""The smallest sensible settings of every backbone that mmdet, mmaction2, mmsegmentation and mmpretrain register.

``NORM`` stands where a ``norm_cfg`` goes. A backbone without one is told its norm by ``replace_norm``.
"""

from typing import Any, NamedTuple

__all__ = ["BACKBONES", "NORM", "Sample"]


class _Norm:
    """Stands for a norm_cfg."""


NORM = _Norm()


class Sample(NamedTuple):
    """How one backbone is built and what it is given.

    Attributes:
        settings: Its config without the type.
        inputs: Shapes of what its forward takes.
    """

    settings: dict[str, Any]
    inputs: list[tuple[int, ...]]


IMAGE, CLIP, SKELETON = (2, 3, 64, 64), (2, 3, 8, 64, 64), (2, 2, 16, 17, 3)


def image(size: int = 64, **settings: Any) -> Sample:
    return Sample(settings, [(2, 3, size, size)])


def clip(frames: int = 8, size: int = 64, **settings: Any) -> Sample:
    return Sample(settings, [(2, 3, frames, size, size)])


def frames(count: int = 8, **settings: Any) -> Sample:
    """Frames of videos as a batch of images."""
    return Sample(settings, [(count, 3, 64, 64)])


STAGES = dict(base_channels=16, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1), norm_cfg=NORM)
THIN = dict(stem_channels=16, **STAGES)
HRNET = {
    f"stage{i}": dict(
        num_modules=1,
        num_branches=i,
        block="BOTTLENECK" if i == 1 else "BASIC",
        num_blocks=(1,) * i,
        num_channels=(64,) if i == 1 else tuple(8 * 2**j for j in range(i)),
    )
    for i in (1, 2, 3, 4)
}
REGNET = dict(w0=16, wa=24.48, wm=2.0, group_w=8, depth=5, bot_mul=1.0)
VIDEO = dict(pretrained=None, norm_cfg=NORM)
VIDEO_3D = dict(
    VIDEO,
    base_channels=8,
    num_stages=2,
    spatial_strides=(1, 2),
    temporal_strides=(1, 1),
    dilations=(1, 1),
    inflate=(1, 1),
    out_indices=(0, 1),
)
PATHWAY = dict(type="resnet3d", depth=50, pretrained=None, base_channels=8, conv1_kernel=(1, 7, 7), norm_cfg=NORM)
VIT = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
SWIN = dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2])
POOL = dict(layers=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], mlp_ratios=[2, 2, 2, 2], layer_scale_init_value=1e-5)
STDC = dict(
    type="STDCNet",
    stdc_type="STDCNet1",
    in_channels=3,
    channels=(8, 16, 16, 32, 32),
    bottleneck_type="cat",
    act_cfg=dict(type="ReLU"),
    num_convs=4,
    with_final_conv=False,
)
TIMM = dict(model_name="resnet18", pretrained=False)

BACKBONES: dict[str, dict[str, Sample]] = {
    "mmdet": {
        "CSPDarknet": image(deepen_factor=0.33, widen_factor=0.125, norm_cfg=NORM),
        "CSPNeXt": image(deepen_factor=0.33, widen_factor=0.125, norm_cfg=NORM),
        "Darknet": image(depth=53, norm_eval=False, norm_cfg=NORM),
        "DetectoRS_ResNeXt": image(depth=50, groups=2, base_width=4, **STAGES),
        "DetectoRS_ResNet": image(depth=50, **STAGES),
        "EfficientNet": image(arch="b0", norm_cfg=NORM),
        "HRNet": image(extra=HRNET, norm_eval=False, norm_cfg=NORM),
        "HourglassNet": image(
            downsample_times=2,
            num_stacks=2,
            stage_channels=[16, 16, 16],
            stage_blocks=[1, 1, 1],
            feat_channel=16,
        ),
        "MobileNetV2": image(widen_factor=0.25, norm_cfg=NORM),
        "PyramidVisionTransformer": image(
            pretrain_img_size=64, embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], norm_cfg=NORM
        ),
        "PyramidVisionTransformerV2": image(
            embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], norm_cfg=NORM
        ),
        "RegNet": image(arch=REGNET, norm_eval=False, norm_cfg=NORM),
        "Res2Net": image(depth=50, base_width=4, **THIN),
        "ResNeSt": image(depth=50, **THIN),
        "ResNeXt": image(depth=50, groups=2, base_width=4, **STAGES),
        "ResNet": image(depth=18, norm_eval=False, **STAGES),
        "ResNetV1d": image(depth=50, norm_eval=False, **STAGES),
        "SSDVGG": image(size=300, depth=11, out_indices=(3, 4), out_feature_indices=(14,)),
        "SwinTransformer": image(
            pretrain_img_size=64,
            embed_dims=16,
            depths=(1, 1),
            num_heads=(1, 2),
            strides=(4, 2),
            out_indices=(0, 1),
            norm_cfg=NORM,
        ),
        "TridentResNet": image(
            depth=50,
            num_branch=2,
            test_branch_idx=1,
            trident_dilations=(1, 2),
            norm_eval=False,
            base_channels=16,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2,),
            norm_cfg=NORM,
        ),
    },
    "mmaction": {
        "AAGCN": Sample(
            dict(graph_cfg=dict(layout="coco", mode="spatial"), base_channels=16, num_stages=2), [SKELETON]
        ),
        "C2D": clip(depth=50, **VIDEO),
        "C3D": clip(frames=16, size=112, norm_cfg=NORM, out_dim=8192),
        "MViT": clip(
            size=32,
            spatial_size=32,
            temporal_size=8,
            arch=dict(embed_dims=16, num_layers=2, num_heads=1, downscale_indices=[1]),
            norm_cfg=NORM,
        ),
        "MobileNetV2": frames(widen_factor=0.25, **VIDEO),
        "MobileNetV2TSM": frames(widen_factor=0.25, num_segments=4, pretrained2d=False, **VIDEO),
        "MobileOneTSM": frames(arch="s0", num_segments=4, pretrained2d=False, norm_cfg=NORM),
        "OmniResNet": clip(layers=[1, 1, 1, 1]),
        "RGBPoseConv3D": Sample(
            dict(
                rgb_pathway=dict(
                    num_stages=4,
                    lateral=True,
                    lateral_infl=1,
                    lateral_activate=[0, 0, 1, 1],
                    base_channels=16,
                    conv1_kernel=(1, 7, 7),
                    inflate=(0, 0, 1, 1),
                    with_pool2=False,
                ),
                pose_pathway=dict(
                    num_stages=3,
                    stage_blocks=(1, 1, 1),
                    lateral=True,
                    lateral_inv=True,
                    lateral_infl=16,
                    lateral_activate=(0, 1, 1),
                    in_channels=17,
                    base_channels=8,
                    out_indices=(2,),
                    conv1_kernel=(1, 7, 7),
                    conv1_stride_s=1,
                    conv1_stride_t=1,
                    pool1_stride_s=1,
                    pool1_stride_t=1,
                    inflate=(0, 1, 1),
                    spatial_strides=(2, 2, 2),
                    temporal_strides=(1, 1, 1),
                    dilations=(1, 1, 1),
                    with_pool2=False,
                ),
            ),
            [(1, 3, 4, 64, 64), (1, 17, 16, 16, 16)],
        ),
        "ResNet": image(depth=18, **VIDEO),
        "ResNet2Plus1d": clip(
            depth=18,
            conv_cfg=dict(type="Conv2plus1d"),
            conv1_kernel=(3, 7, 7),
            conv1_stride_t=1,
            pool1_stride_t=1,
            with_pool2=False,
            pretrained2d=False,
            pretrained=None,
            base_channels=16,
        ),
        "ResNet3d": clip(depth=50, **VIDEO_3D),
        "ResNet3dCSN": clip(
            depth=50,
            pretrained2d=False,
            bottleneck_mode="ir",
            with_pool2=True,
            base_channels=8,
            **VIDEO,
        ),
        "ResNet3dLayer": Sample(dict(depth=50, stage=3, base_channels=8, **VIDEO), [(2, 1024, 4, 8, 8)]),
        "ResNet3dSlowFast": clip(
            resample_rate=4,
            speed_ratio=4,
            channel_ratio=2,
            pretrained=None,
            slow_pathway=PATHWAY | dict(lateral=True, inflate=(0, 0, 1, 1)),
            fast_pathway=PATHWAY | dict(lateral=False, conv1_kernel=(5, 7, 7), base_channels=4),
        ),
        "ResNet3dSlowOnly": clip(depth=50, **VIDEO_3D),
        "ResNetAudio": Sample(dict(depth=50, base_channels=8, pretrained=None), [(2, 1, 64, 64)]),
        "ResNetTIN": frames(depth=50, num_segments=4, pretrained2d=False, **VIDEO),
        "ResNetTSM": frames(depth=50, num_segments=4, pretrained2d=False, **VIDEO),
        "STGCN": Sample(
            dict(graph_cfg=dict(layout="coco", mode="stgcn_spatial"), base_channels=16, num_stages=2), [SKELETON]
        ),
        "SwinTransformer3D": clip(
            arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]),
            out_indices=(1,),
            window_size=(2, 4, 4),
            norm_cfg=NORM,
        ),
        "TANet": frames(depth=50, num_segments=4),
        "TimeSformer": clip(
            frames=4,
            size=32,
            num_frames=4,
            img_size=32,
            patch_size=16,
            embed_dims=32,
            num_heads=2,
            num_transformer_layers=1,
            norm_cfg=NORM,
        ),
        "UniFormer": clip(size=64, depth=[1, 1, 1, 1], img_size=64, embed_dim=[16, 32, 64, 64], head_dim=16),
        "UniFormerV2": clip(
            size=32,
            input_resolution=32,
            patch_size=16,
            width=32,
            layers=2,
            heads=2,
            t_size=8,
            return_list=[1],
            n_layers=1,
            n_dim=32,
            n_head=2,
            mlp_dropout=[0.5],
            clip_pretrained=False,
            no_lmhra=False,
        ),
        "VisionTransformer": clip(
            size=32, img_size=32, embed_dims=32, depth=2, num_heads=2, num_frames=8, norm_cfg=NORM
        ),
        "X3D": clip(gamma_w=1, gamma_b=1, gamma_d=1, norm_cfg=NORM),
    },
    "mmseg": {
        "BEiT": image(img_size=64, embed_dims=32, num_layers=2, num_heads=2, norm_cfg=NORM),
        "BiSeNetV1": image(
            backbone_cfg=dict(type="ResNet", depth=18, base_channels=8, stem_channels=8),
            spatial_channels=(8, 8, 8, 16),
            context_channels=(16, 32, 64),
            out_channels=64,
        ),
        "BiSeNetV2": image(
            detail_channels=(16, 16, 64),
            semantic_channels=(16, 16, 32, 64),
            semantic_expansion_ratio=2,
            bga_channels=64,
        ),
        "CGNet": image(num_channels=(16, 32, 64), num_blocks=(2, 2), norm_cfg=NORM),
        "DDRNet": image(size=128, channels=8, ppm_channels=16),
        "ERFNet": image(),
        "FastSCNN": image(
            downsample_dw_channels=(8, 16),
            global_in_channels=16,
            global_block_channels=(16, 16, 32),
            global_out_channels=32,
            higher_in_channels=16,
            lower_in_channels=32,
            fusion_out_channels=32,
            norm_cfg=NORM,
        ),
        "HRNet": image(extra=HRNET, norm_cfg=NORM),
        "ICNet": image(
            size=256,
            backbone_cfg=dict(type="ResNetV1c", depth=50, base_channels=8, stem_channels=8, norm_cfg=NORM),
            layer_channels=(64, 256),
            light_branch_middle_channels=16,
            psp_out_channels=64,
            out_channels=(16, 32, 32),
            norm_cfg=NORM,
        ),
        "MAE": image(img_size=64, embed_dims=32, num_layers=2, num_heads=2, norm_cfg=NORM),
        "MSCAN": image(embed_dims=[8, 16, 16, 32], depths=[1, 1, 1, 1], norm_cfg=NORM),
        "MixVisionTransformer": image(
            embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1], norm_cfg=NORM
        ),
        "MobileNetV2": image(widen_factor=0.25, norm_cfg=NORM),
        "MobileNetV3": image(arch="small", norm_cfg=NORM),
        "PCPVT": image(embed_dims=[8, 16, 16, 32], num_heads=[1, 1, 1, 1], depths=[1, 1, 1, 1], norm_cfg=NORM),
        "PIDNet": image(size=128, channels=8, ppm_channels=16),
        "ResNeSt": image(depth=50, **THIN),
        "ResNeXt": image(depth=50, groups=2, base_width=4, **THIN),
        "ResNet": image(depth=18, **THIN),
        "ResNetV1c": image(depth=50, **THIN),
        "ResNetV1d": image(depth=50, **THIN),
        "STDCContextPathNet": image(
            backbone_cfg=dict(STDC, norm_cfg=dict(type="BN")),
            last_in_channels=(32, 32),
            out_channels=64,
            ffm_cfg=dict(in_channels=16 + 64, out_channels=64, scale_factor=4),
        ),
        "STDCNet": image(**{key: value for key, value in STDC.items() if key != "type"}, norm_cfg=NORM),
        "SVT": image(
            embed_dims=[8, 16, 16], num_heads=[1, 1, 1], depths=[1, 1, 1], patch_sizes=[4, 2, 2], norm_cfg=NORM
        ),
        "SwinTransformer": image(
            pretrain_img_size=64,
            embed_dims=16,
            depths=(1, 1),
            num_heads=(1, 2),
            strides=(4, 2),
            out_indices=(0, 1),
            norm_cfg=NORM,
        ),
        "TIMMBackbone": image(**TIMM),
        "UNet": image(
            base_channels=8,
            num_stages=3,
            strides=(1, 1, 1),
            enc_num_convs=(2, 2, 2),
            dec_num_convs=(2, 2),
            downsamples=(True, True),
            enc_dilations=(1, 1, 1),
            dec_dilations=(1, 1),
            norm_cfg=NORM,
        ),
        "VPD": image(diffusion_cfg=dict(base_size=64), class_embed_path="", unet_cfg=dict(use_attn=False)),
        "VisionTransformer": image(img_size=64, embed_dims=32, num_layers=2, num_heads=2, norm_cfg=NORM),
    },
    "mmpretrain": {
        "AlexNet": image(size=224),
        "BEiTViT": image(img_size=64, arch=VIT, norm_cfg=NORM),
        "CSPDarkNet": image(depth=53, norm_cfg=NORM),
        "CSPResNeXt": image(depth=50, norm_cfg=NORM),
        "CSPResNet": image(depth=50, norm_cfg=NORM),
        "Conformer": image(
            size=224,
            arch=dict(embed_dims=32, depths=12, num_heads=2, channel_ratio=1),
            base_channels=16,
            norm_eval=False,
        ),
        "ConvMixer": image(arch=dict(embed_dims=32, depth=2, patch_size=7, kernel_size=7), norm_cfg=NORM),
        "ConvNeXt": image(arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 16, 32]), norm_cfg=NORM),
        "DaViT": image(
            arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]),
            out_indices=(1,),
            pad_small_map=True,
            norm_cfg=NORM,
        ),
        "DeiT3": image(img_size=64, arch=VIT, norm_cfg=NORM),
        "DenseNet": image(arch=dict(growth_rate=8, depths=[2, 2], init_channels=16), norm_cfg=NORM),
        "DistilledVisionTransformer": image(img_size=64, arch=VIT, norm_cfg=NORM),
        "EdgeNeXt": image(
            arch=dict(channels=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2]), norm_cfg=NORM
        ),
        "EfficientFormer": image(
            arch=dict(
                layers=[1, 1, 1, 2], embed_dims=[16, 16, 32, 32], downsamples=[False, True, True, True], vit_num=1
            ),
            size=224,
        ),
        "EfficientNet": image(arch="b0", norm_cfg=NORM),
        "EfficientNetV2": image(arch="b0", norm_cfg=NORM),
        "HRNet": image(extra=HRNET),
        "HiViT": image(
            img_size=64, arch=dict(embed_dims=32, depths=[1, 1, 2], num_heads=2), out_indices=[3], norm_cfg=NORM
        ),
        "HorNet": image(
            arch=dict(
                base_dim=16,
                depths=[1, 1, 1, 1],
                orders=[2, 3, 4, 5],
                dw_cfg=[dict(type="DW", kernel_size=7)] * 4,
            )
        ),
        "InceptionV3": image(size=96),
        "LeNet5": Sample({}, [(2, 1, 32, 32)]),
        "LeViT": image(size=224, arch="128s"),
        "MViT": image(
            img_size=64,
            arch=dict(embed_dims=16, num_layers=2, num_heads=1, downscale_indices=[1]),
            norm_cfg=NORM,
        ),
        "MixMIMTransformer": image(
            arch=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
            img_size=64,
            window_size=[4, 4, 4, 2],
            norm_cfg=NORM,
        ),
        "MlpMixer": image(
            img_size=64, arch=dict(embed_dims=32, num_layers=2, tokens_mlp_dims=16, channels_mlp_dims=64), norm_cfg=NORM
        ),
        "MobileNetV2": image(widen_factor=0.25, norm_cfg=NORM),
        "MobileNetV3": image(arch="small", norm_cfg=NORM),
        "MobileOne": image(
            arch=dict(
                num_blocks=[1, 1, 1, 1],
                width_factor=[0.25, 0.25, 0.25, 0.25],
                num_conv_branches=[2, 2, 2, 2],
                num_se_blocks=[0, 0, 1, 1],
            ),
            norm_cfg=NORM,
        ),
        "MobileViT": image(arch="xx_small"),
        "PCPVT": image(
            arch=dict(
                embed_dims=[8, 16, 16, 32],
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 1, 1],
                patch_sizes=[4, 2, 2, 2],
                strides=[4, 2, 2, 2],
                mlp_ratios=[2, 2, 2, 2],
                sr_ratios=[8, 4, 2, 1],
            ),
            norm_cfg=NORM,
        ),
        "PoolFormer": image(arch=dict(POOL), norm_cfg=NORM),
        "PyramidVig": image(size=224, arch="tiny"),
        "RIFormer": image(arch=dict(POOL), norm_cfg=NORM),
        "RegNet": image(arch=REGNET, norm_cfg=NORM),
        "RepLKNet": image(
            arch=dict(
                large_kernel_sizes=[7, 7, 5, 5],
                layers=[1, 1, 1, 1],
                channels=[16, 16, 32, 32],
                small_kernel=3,
                dw_ratio=1,
            ),
        ),
        "RepMLPNet": image(
            img_size=64,
            arch=dict(channels=[16, 32], depths=[1, 1], sharesets_nums=[1, 4]),
            out_indices=(1,),
        ),
        "RepVGG": image(
            arch=dict(num_blocks=[1, 1, 1, 1], width_factor=[0.25] * 4, group_layer_map=None, se_cfg=dict(ratio=4)),
            norm_cfg=NORM,
        ),
        "Res2Net": image(depth=50, base_width=4, **THIN),
        "ResNeSt": image(depth=50, **THIN),
        "ResNeXt": image(depth=50, groups=2, width_per_group=4, **THIN),
        "ResNet": image(depth=18, **THIN),
        "ResNetV1c": image(depth=50, **THIN),
        "ResNetV1d": image(depth=50, **THIN),
        "ResNet_CIFAR": image(size=32, depth=18, **THIN),
        "RevVisionTransformer": image(img_size=64, arch=VIT, norm_cfg=NORM),
        "SEResNeXt": image(depth=50, groups=2, width_per_group=4, **THIN),
        "SEResNet": image(depth=50, se_ratio=4, **THIN),
        "SVT": image(
            arch=dict(
                embed_dims=[8, 16, 16, 32],
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 1, 1],
                patch_sizes=[4, 2, 2, 2],
                strides=[4, 2, 2, 2],
                mlp_ratios=[2, 2, 2, 2],
                sr_ratios=[4, 2, 1, 1],
                window_sizes=[7, 7, 7, 7],
            ),
            norm_cfg=NORM,
        ),
        "ShuffleNetV1": image(norm_cfg=NORM),
        "ShuffleNetV2": image(widen_factor=0.5, norm_cfg=NORM),
        "SparseConvNeXt": image(arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 16, 32]), norm_cfg=NORM),
        "SparseResNet": image(depth=50, **THIN),
        "SwinTransformer": image(img_size=64, arch=SWIN, window_size=4, out_indices=(1,), norm_cfg=NORM),
        "SwinTransformerV2": image(
            img_size=64,
            arch=SWIN | dict(extra_norm_every_n_blocks=0),
            window_size=4,
            out_indices=(1,),
            pretrained_window_sizes=[0, 0],
            norm_cfg=NORM,
        ),
        "T2T_ViT": image(
            img_size=64,
            embed_dims=32,
            num_layers=2,
            layer_cfgs=dict(num_heads=2, feedforward_channels=64),
            norm_cfg=NORM,
        ),
        "TIMMBackbone": image(**TIMM),
        "TNT": image(
            img_size=64,
            arch=dict(embed_dims_outer=32, embed_dims_inner=16, num_layers=2, num_heads_outer=2, num_heads_inner=2),
            norm_cfg=NORM,
        ),
        "TinyViT": image(
            img_size=(64, 64),
            arch=dict(channels=[16, 32, 32, 64], num_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]),
            window_size=[7, 7, 7, 7],
        ),
        "VAN": image(
            arch=dict(embed_dims=[8, 16, 16, 32], depths=[1, 1, 1, 1], ffn_ratios=[2, 2, 2, 2]), norm_cfg=NORM
        ),
        "VGG": image(depth=11, norm_cfg=NORM),
        "ViTEVA02": image(img_size=64, arch=VIT, norm_cfg=NORM),
        "ViTSAM": image(
            img_size=64, arch=VIT | dict(global_attn_indexes=[1]), out_channels=32, window_size=2, norm_cfg=NORM
        ),
        "Vig": image(size=224, arch="tiny"),
        "VisionTransformer": image(img_size=64, arch=VIT, norm_cfg=NORM),
        "XCiT": image(img_size=64, embed_dims=32, depth=2, cls_attn_layers=1, num_heads=2, bn_norm_cfg=NORM),
    },
}
