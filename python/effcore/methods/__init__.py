"""One file per paper. A method changes how a model trains; what it needs of a model is written down as a Protocol.

- :mod:`effcore.methods.epas`: progressive activation sharing (arXiv 2601.19089)
- :mod:`effcore.methods.echo_llama`: gradual conversion to shared keys and values (arXiv 2505.17331)
- :mod:`effcore.methods.skipvit`: patches that skip blocks of a vision transformer (SkipViT)
- :mod:`effcore.methods.swiftlearn`: training on the samples whose outputs still move (arXiv 2311.15134)
- :mod:`effcore.methods.ttc`: stopping where samples at test time make up for more training (arXiv 2601.01332)
- :mod:`effcore.methods.vds_ttt`: test-time training on samples that a verifier trusts (arXiv 2505.19475)
- :mod:`effcore.methods.conv3d`: 3D convolutions from 2D and 1D parts
- :mod:`effcore.methods.low_rank`: layers as factors of low rank, ranks by measured time (arXiv 2407.20266)
- :mod:`effcore.methods.flowhn`: tokens dealt by FLOPs to attention and an SSM side by side
- :mod:`effcore.methods.bayesian_moe`: a Laplace posterior over experts (arXiv 2511.08968)
"""

from effcore._lazy import submodules

__getattr__ = submodules(__name__)
