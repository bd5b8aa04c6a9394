// Run small scenarios of npm packages that people use with /v1; print one JSON line for each.
//
//     cp tests/clients/package.json DIR && npm install --prefix DIR
//     cd DIR
//     node_modules/.bin/node --input-type=module - URL TOKEN [CLIENT ...] < .../run_clients.mjs
//
// Lines and checks are those of run_clients.py; the packages are found in the current folder.

import { readFileSync } from "node:fs";
import { z } from "zod";

const MODEL = "sonnet";
const SCENARIO_SECONDS = 60;
const QUESTION = "What is the weather in Rome?";
const WEATHER = "sunny in Rome";
const CITY = z.object({ city: z.string() });
const ANSWER = z.object({ answer: z.string() });
const TOOL = { name: "get_weather", description: "Return the weather of a city." };
const QUESTIONS = [{ role: "user", content: QUESTION }];
const getWeather = ({ city }) => "sunny in " + city;

const [url, token, ...chosen] = process.argv.slice(2);
const OPENAI = { baseURL: url + "/v1", apiKey: token };
const ANTHROPIC = { baseURL: url, apiKey: token };
// [client, "what is asked: how", the function], in the order of the table
const scenarios = [];

// client: the name of its package, to which " (Node)" is added where Python has the same name
function scenario(client, what, run) {
  scenarios.push([client, what, run]);
}

function check(value, expected) {
  if (typeof value !== "string" || !value.includes(expected)) {
    throw new Error(`${JSON.stringify(value)} instead of ${expected}`);
  }
}

function checkEqual(value, expected) {
  const [got, wanted] = [JSON.stringify(value), JSON.stringify(expected)];
  if (got !== wanted) throw new Error(`${got} instead of ${wanted}`);
}

function checkUsage(...counts) {
  if (!counts.every((count) => count > 0)) throw new Error(`usage: ${JSON.stringify(counts)}`);
}

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

// --- openai ---

async function openaiClient() {
  const { default: OpenAI } = await import("openai");
  return new OpenAI({ ...OPENAI, maxRetries: 0 });
}

scenario("openai (Node)", "chat: whole", async () => {
  const client = await openaiClient();
  const messages = [{ role: "user", content: "hello" }];
  const completion = await client.chat.completions.create({ model: MODEL, messages });
  check(completion.choices[0].message.content, "Echo: hello");
  checkUsage(completion.usage.prompt_tokens, completion.usage.completion_tokens);
});

scenario("openai (Node)", "chat: streamed", async () => {
  const client = await openaiClient();
  const messages = [{ role: "user", content: "hello" }];
  const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
  const pieces = (await all(stream)).map((chunk) => chunk.choices[0]?.delta.content ?? "");
  check(pieces.join(""), "Echo: hello");
});

scenario("openai (Node)", "chat: `runTools`", async () => {
  const client = await openaiClient();
  const parameters = z.toJSONSchema(CITY);
  const weather = { ...TOOL, parameters, parse: JSON.parse, function: getWeather };
  const tools = [{ type: "function", function: weather }];
  const runner = client.chat.completions.runTools({ model: MODEL, messages: QUESTIONS, tools });
  check(await runner.finalContent(), WEATHER);
});

scenario("openai (Node)", "chat: `parse` with zod", async () => {
  const client = await openaiClient();
  const { zodResponseFormat } = await import("openai/helpers/zod");
  const messages = [{ role: "user", content: "forty-two" }];
  const format = zodResponseFormat(ANSWER, "answer");
  const fields = { model: MODEL, messages, response_format: format };
  const completion = await client.chat.completions.parse(fields);
  check(completion.choices[0].message.parsed.answer, "forty-two");
});

scenario("openai (Node)", "Responses: whole", async () => {
  const client = await openaiClient();
  const response = await client.responses.create({ model: MODEL, input: "hello" });
  check(response.output_text, "Echo: hello");
});

scenario("openai (Node)", "Responses: streamed", async () => {
  const client = await openaiClient();
  const stream = client.responses.stream({ model: MODEL, input: "hello" });
  const deltas = (await all(stream)).filter((e) => e.type === "response.output_text.delta");
  check(deltas.map((event) => event.delta).join(""), "Echo: hello");
  check((await stream.finalResponse()).output_text, "Echo: hello");
});

scenario("openai (Node)", "Responses: a tool", async () => {
  const client = await openaiClient();
  const parameters = z.toJSONSchema(CITY);
  const tools = [{ type: "function", ...TOOL, parameters, strict: true }];
  const first = await client.responses.create({ model: MODEL, input: QUESTION, tools });
  const calls = first.output.filter((item) => item.type === "function_call");
  checkEqual(calls.map((call) => call.name), ["get_weather"]);
  const output = getWeather(JSON.parse(calls[0].arguments));
  const result = { type: "function_call_output", call_id: calls[0].call_id, output };
  const fields = { model: MODEL, tools, previous_response_id: first.id, input: [result] };
  check((await client.responses.create(fields)).output_text, WEATHER);
});

scenario("openai (Node)", "Responses: `parse` with zod", async () => {
  const client = await openaiClient();
  const { zodTextFormat } = await import("openai/helpers/zod");
  const text = { format: zodTextFormat(ANSWER, "answer") };
  const response = await client.responses.parse({ model: MODEL, input: "forty-two", text });
  check(response.output_parsed.answer, "forty-two");
});

// --- @anthropic-ai/sdk ---

async function anthropicClient(fields = {}) {
  const { default: Anthropic } = await import("@anthropic-ai/sdk");
  return new Anthropic({ ...ANTHROPIC, maxRetries: 0, ...fields });
}

const HELLO = { model: MODEL, max_tokens: 1000, messages: [{ role: "user", content: "hello" }] };

scenario("@anthropic-ai/sdk", "Messages: `create`", async () => {
  const client = await anthropicClient();
  check((await client.messages.create(HELLO)).content[0].text, "Echo: hello");
});

scenario("@anthropic-ai/sdk", "Messages: `stream`", async () => {
  const client = await anthropicClient();
  const stream = client.messages.stream(HELLO);
  const pieces = [];
  stream.on("text", (piece) => pieces.push(piece));
  const message = await stream.finalMessage();
  check(pieces.join(""), "Echo: hello");
  check(message.content[0].text, "Echo: hello");
  checkUsage(message.usage.input_tokens, message.usage.output_tokens);
});

scenario("@anthropic-ai/sdk", "Messages: `parse` with zod", async () => {
  const client = await anthropicClient();
  const { zodOutputFormat } = await import("@anthropic-ai/sdk/helpers/zod");
  const messages = [{ role: "user", content: "forty-two" }];
  const output_config = { format: zodOutputFormat(ANSWER) };
  const message = await client.messages.parse({ ...HELLO, messages, output_config });
  check(message.parsed_output.answer, "forty-two");
});

scenario("@anthropic-ai/sdk", "Messages: `countTokens`", async () => {
  const client = await anthropicClient();
  const { model, messages } = HELLO;
  checkUsage((await client.messages.countTokens({ model, messages })).input_tokens);
});

for (const stream of [false, true]) {
  const how = stream ? "streamed" : "whole, going on without a thread";
  scenario("@anthropic-ai/sdk", "`toolRunner`: " + how, async () => {
    const statuses = [];
    const noting = async (...request) => {
      const answer = await fetch(...request);
      statuses.push(answer.status);
      return answer;
    };
    const client = await anthropicClient({ fetch: noting });
    const { betaZodTool } = await import("@anthropic-ai/sdk/helpers/beta/zod");
    const tools = [betaZodTool({ ...TOOL, inputSchema: CITY, run: getWeather })];
    const fields = { ...HELLO, messages: QUESTIONS, tools, stream };
    const message = await client.beta.messages.toolRunner(fields).runUntilDone();
    check(message.content[0].text, WEATHER);
    // Only the first request asks for a thread.
    checkEqual(statuses, [400, 200, 200]);
  });
}

// --- @openai/agents ---

// Return an agent for which neither a model nor an API is chosen.
async function agentOf(fields) {
  const agents = await import("@openai/agents");
  agents.setTracingDisabled(true);
  agents.setDefaultOpenAIClient(await openaiClient());
  const weather = agents.tool({ ...TOOL, parameters: CITY, execute: getWeather });
  const tools = [weather];
  return new agents.Agent({ name: "helper", instructions: "Be brief.", tools, ...fields });
}

async function runAgent(agent, fields) {
  const { run } = await import("@openai/agents");
  return run(agent, QUESTION, fields);
}

scenario("@openai/agents", "Responses (the default): a tool", async () => {
  check((await runAgent(await agentOf())).finalOutput, WEATHER);
});

scenario("@openai/agents", "Responses (the default): streamed", async () => {
  const result = await runAgent(await agentOf(), { stream: true });
  check((await all(result.toTextStream())).join(""), WEATHER);
  await result.completed;
  check(result.finalOutput, WEATHER);
});

scenario("@openai/agents", "Responses (the default): a tool and an `outputType`", async () => {
  const result = await runAgent(await agentOf({ outputType: ANSWER }));
  check(result.finalOutput.answer, WEATHER);
});

// --- LangChain ---

async function chatOpenAI(fields) {
  const { ChatOpenAI } = await import("@langchain/openai");
  const { baseURL, apiKey } = OPENAI;
  const configuration = { baseURL };
  return new ChatOpenAI({ model: MODEL, maxRetries: 0, apiKey, configuration, ...fields });
}

async function chatAnthropic() {
  const { ChatAnthropic } = await import("@langchain/anthropic");
  const { baseURL: anthropicApiUrl, apiKey } = ANTHROPIC;
  return new ChatAnthropic({ model: MODEL, maxRetries: 0, apiKey, anthropicApiUrl });
}

for (const [client, label, make] of [
  ["@langchain/openai", "`ChatOpenAI`", chatOpenAI],
  ["@langchain/openai", "`ChatOpenAI` by Responses", () => chatOpenAI({ useResponsesApi: true })],
  ["@langchain/anthropic", "`ChatAnthropic`", chatAnthropic],
]) {
  scenario(client, label + ": `stream` with usage", async () => {
    const chunks = await all(await (await make()).stream("hello"));
    check(chunks.map((chunk) => chunk.text).join(""), "Echo: hello");
    const usage = chunks.reduce((sum, chunk) => sum.concat(chunk)).usage_metadata;
    checkUsage(usage.input_tokens, usage.output_tokens);
  });

  scenario(client, label + ": `createAgent` with a tool", async () => {
    const { createAgent, tool } = await import("langchain");
    const tools = [tool(getWeather, { ...TOOL, schema: CITY })];
    const agent = createAgent({ model: await make(), tools });
    const { messages } = await agent.invoke({ messages: QUESTIONS });
    check(messages.at(-1).text, WEATHER);
  });

  scenario(client, label + ": `withStructuredOutput`", async () => {
    const model = await make();
    for (const method of ["jsonSchema", "functionCalling"]) {
      const answer = await model.withStructuredOutput(ANSWER, { method }).invoke("forty-two");
      check(answer.answer, "forty-two");
    }
  });
}

// --- the AI SDK ---

// Return the model that the provider chooses for a name: one of the Responses API.
async function aiModel() {
  const { createOpenAI } = await import("@ai-sdk/openai");
  return createOpenAI(OPENAI)(MODEL);
}

async function aiTools() {
  const { isStepCount, tool } = await import("ai");
  const { description } = TOOL;
  const get_weather = tool({ description, inputSchema: CITY, execute: getWeather });
  return { prompt: QUESTION, tools: { get_weather }, stopWhen: isStepCount(3) };
}

scenario("ai", "Responses (the default of `@ai-sdk/openai`): `generateText`", async () => {
  const { generateText } = await import("ai");
  const result = await generateText({ model: await aiModel(), maxRetries: 0, prompt: "hello" });
  check(result.text, "Echo: hello");
  checkUsage(result.usage.inputTokens, result.usage.outputTokens);
});

scenario("ai", "Responses (the default of `@ai-sdk/openai`): `streamText`", async () => {
  const { streamText } = await import("ai");
  const result = streamText({ model: await aiModel(), maxRetries: 0, prompt: "hello" });
  check((await all(result.textStream)).join(""), "Echo: hello");
  checkUsage((await result.usage).inputTokens);
});

scenario("ai", "Responses (the default of `@ai-sdk/openai`): a tool", async () => {
  const { generateText } = await import("ai");
  const fields = { model: await aiModel(), maxRetries: 0, ...(await aiTools()) };
  check((await generateText(fields)).text, WEATHER);
});

scenario("ai", "Responses (the default of `@ai-sdk/openai`): a streamed tool", async () => {
  const { streamText } = await import("ai");
  const fields = { model: await aiModel(), maxRetries: 0, ...(await aiTools()) };
  check((await all(streamText(fields).textStream)).join(""), WEATHER);
});

scenario("ai", "Responses (the default of `@ai-sdk/openai`): `generateObject`", async () => {
  const { generateObject } = await import("ai");
  const fields = { model: await aiModel(), maxRetries: 0, schema: ANSWER, prompt: "forty-two" };
  check((await generateObject(fields)).object.answer, "forty-two");
});

// --- running ---

function versionOf(client) {
  const name = client.replace(" (Node)", "");
  return JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf-8")).version;
}

// Run a scenario within its time. -> what went wrong, or null
async function errorOf(run) {
  let timer;
  const tooSlow = new Promise((_, reject) => {
    const error = new Error(`it took longer than ${SCENARIO_SECONDS} s`);
    timer = setTimeout(() => reject(error), SCENARIO_SECONDS * 1000);
  });
  try {
    await Promise.race([run(), tooSlow]);
    return null;
  } catch (error) {
    return String(error).split(/\s+/).join(" ").slice(0, 1000);
  } finally {
    clearTimeout(timer);
  }
}

for (const [client, what, run] of scenarios) {
  if (chosen.length && !chosen.includes(client)) continue;
  const error = await errorOf(run);
  const version = versionOf(client);
  console.log(JSON.stringify({ client, version, scenario: what, ok: error === null, error }));
}
process.exit(0);
