"""Named settings to start from. Knows nothing but TrainConfig."""

from fastppo.config import TrainConfig

PRESETS: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    # the settings of the article that fastppo grew from: those of the PPO paper's Atari runs, on CartPole
    "article": TrainConfig(
        preset="article",
        num_envs=8,
        num_steps=128,
        num_iterations=100,
        reset_each_rollout=True,  # each of the article's actors starts anew
        num_minibatches=4,
        update_epochs=3,
        learning_rate=2.5e-4,
        anneal_lr=True,
        clip_coef=0.1,
        anneal_clip=True,
        gamma=0.99,
        advantage="monte-carlo",
        norm_returns=True,
        norm_adv=False,
        vf_coef=1.0,
        ent_coef=0.01,
        max_grad_norm=float("inf"),
        hidden_sizes=(100, 100),
        activation="relu",
        seed=0,
        eval_episodes=5,
    ),
    "continuous": TrainConfig(
        preset="continuous",
        env_id="Pendulum-v1",
        total_timesteps=200_000,
        num_envs=8,
        num_steps=256,
        num_minibatches=32,
        update_epochs=10,
        learning_rate=1e-3,
        gamma=0.9,
        norm_obs=True,
        norm_reward=True,
    ),
}
