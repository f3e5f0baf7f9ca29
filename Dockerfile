# docker build -t framemesh .
# docker run --gpus all --shm-size 32g --ipc=host -p 30000:30000 -v ~/.cache/huggingface:/home/mesh/.cache/huggingface \
#        -e HF_TOKEN framemesh serve --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num-gpus 4
FROM python:3.12-slim
RUN useradd --create-home mesh
WORKDIR /opt/framemesh
COPY . .
RUN pip install --no-cache-dir torch==2.13.0 && pip install --no-cache-dir .
USER mesh
WORKDIR /home/mesh
VOLUME /home/mesh/.cache/huggingface
EXPOSE 30000
ENV FRAMEMESH_HOST=0.0.0.0
ENTRYPOINT ["framemesh"]
CMD ["serve"]
