//! gRPC: `EventService/SendEvent` over one HTTP/2 connection, which reconnects by itself.

use tonic::metadata::{Ascii, MetadataKey, MetadataValue};
use tonic::transport::Channel;

use super::{ClientError, ClientOptions, Refusal};
use crate::proto;
use crate::proto::event_service_client::EventServiceClient;

#[derive(Debug, Clone)]
pub(super) struct GrpcClient {
    service: EventServiceClient<Channel>,
    metadata: Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>,
}

impl GrpcClient {
    pub(super) async fn connect(options: &ClientOptions) -> Result<Self, ClientError> {
        let mut metadata = Vec::new();
        for (name, value) in options.headers()? {
            let invalid = || ClientError::InvalidHeader { name: name.to_string() };
            let key = MetadataKey::from_bytes(name.as_str().as_bytes()).map_err(|_| invalid())?;
            let value = MetadataValue::try_from(value.as_bytes()).map_err(|_| invalid())?;
            metadata.push((key, value));
        }
        let failed = |error: tonic::transport::Error| ClientError::connect(&options.endpoint, error);
        let channel = Channel::from_shared(format!("http://{}", options.endpoint.authority))
            .map_err(|error| ClientError::connect(&options.endpoint, error))?
            .tcp_nodelay(true)
            .connect()
            .await
            .map_err(failed)?;
        Ok(GrpcClient { service: EventServiceClient::new(channel), metadata })
    }

    pub(super) async fn send(&self, request: proto::SendEventRequest) -> Result<proto::SendEventResponse, ClientError> {
        let mut request = tonic::Request::new(request);
        for (key, value) in &self.metadata {
            request.metadata_mut().insert(key.clone(), value.clone());
        }
        let answer = self.service.clone().send_event(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| ClientError::Refused(Refusal::from_grpc(&status)))
    }
}
