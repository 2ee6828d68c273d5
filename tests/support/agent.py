"""An agent of openai-agents with a tool and an output type, which either calls or answers."""

from __future__ import annotations

from importlib import import_module

from serving import NAME


async def check_agent(url: str, kind: str) -> None:
    """Run one through the class `kind` of the package's models: a call or the JSON comes."""
    agents, openai, pydantic = map(import_module, ("agents", "openai", "pydantic"))
    agents.set_tracing_disabled(True)

    def weather(day: int) -> str:
        return "sunny"

    result = pydantic.create_model("Result", ok=(bool, ...))
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as api:
        agent = agents.Agent(
            name="a",
            model=getattr(agents, kind)(model=NAME, openai_client=api),
            tools=[agents.function_tool(weather)],
            output_type=result,
            model_settings=agents.ModelSettings(max_tokens=400, temperature=0),
        )
        try:
            found = await agents.Runner.run(agent, "Is it sunny?", max_turns=2)
        except agents.MaxTurnsExceeded:
            return  # it has called, and would call again
        assert isinstance(found.final_output, result)
